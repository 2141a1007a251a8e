"""CT figures: methods side by side, as in the paper's Figure 1, and the worst slices."""

import math
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.overlap import slice_dice
from pgpsam_jax.report.figures.csv_rows import read_rows, scores_of, write_rows
from pgpsam_jax.report.figures.picture import Picture, draw
from pgpsam_jax.report.figures.scored_volumes import ScoredVolume, TestSet, fullest_slice
from pgpsam_jax.report.figures.slice_panels import Slice, corner_text, draw_panel, frame_ratio
from pgpsam_jax.utils.untrusted_text import sanitize
from pgpsam_jax.visualization import overlays

_CASES, _METHODS = 4, 6  # maximum rows and methods in the comparison
_FAILURES, _PER_CASE, _APART = 12, 2, 3  # at most, at most per case, and their distance
_WIDE = 9.5  # inches of all panels of a full-width figure


def qualitative(groups, folder) -> Picture:
    """Figure with cases as rows; image, methods (first finished seed each) and truth as columns."""
    groups = [group for group in groups if scores_of(group) is not None]
    groups = [groups[place] for place in overlays.evenly_spaced(len(groups), _METHODS)]
    runs = [next(run for run in group.runs if run.cases) for group in groups]
    labels = [group.label for group in groups] if len(groups) > 1 else ["prediction"]
    tests, names = TestSet(runs[0]), runs[0].names
    slices, rows = [], []
    omitted: list[str] = []
    cases = _ranked_cases(scores_of(groups[-1]))
    for case_id, volume in _read_cases(tests, cases, runs, omitted):
        image, truth, predictions, spacing, region, directions = volume
        z = fullest_slice(truth, len(names), region)
        of_slice = [p[z] for p in predictions]
        part = Slice(case_id, z, image[z], truth[z], spacing, of_slice, directions)
        slices.append(part.cropped())
        for label, prediction in zip(labels, slices[-1].predictions, strict=True):
            dice = _mean_dice(prediction, slices[-1].truth, names)
            rows.append(part.key | {"label": label, "dice": dice})
    rows = _write_and_read(folder, "qualitative", rows)
    return draw(
        lambda theme: _comparison(slices, rows, labels, names),
        folder,
        "qualitative",
        "Predictions and ground truth",
        "Cases ranked by Dice, from worst (top) to best (bottom), each shown at the slice with the "
        "most organs. Numbers: mean Dice over the organs in that slice. R, L, A, P: the patient's "
        "right, left, anterior and posterior." + _omission_note(omitted),
        raster=True,
        alt=f"CT slices of {len(slices)} test cases with the organs outlined in color: image, "
        f"{', '.join(labels)}, ground truth",
    )


def _read_cases(tests, cases, runs, omitted: list[str]) -> Iterator[tuple[str, ScoredVolume]]:
    """Yields cases with their volumes; reasons for unreadable cases go to `omitted`.

    Raises the last `UserError` if no case can be read.
    """
    count = 0
    for case_id in cases:
        try:
            volume = tests.read(case_id, runs)
        except UserError as error:
            print(f"skipped: {sanitize(str(error), 1000)}", file=sys.stderr, flush=True)
            omitted.append(f"case {case_id} ({error})")
            last = error
        else:
            count += 1
            yield case_id, volume
    if omitted and not count:
        raise last


def _omission_note(omitted: list[str]) -> str:
    return f" Omitted: {'; '.join(omitted)}." if omitted else ""


def _ranked_cases(scores) -> list[str]:
    """Up to four cases from the lowest to the highest Dice, evenly spaced by rank."""
    values = scores.case_scores()
    ranked = [scores.cases[i] for i in np.argsort(values, kind="stable") if values[i] == values[i]]
    return [ranked[place] for place in overlays.evenly_spaced(len(ranked), _CASES)]


def _comparison(slices, rows, labels, names):
    width = len(labels) + 2
    size = _panel_width(width)
    titles = [
        textwrap.fill(title, int(11 * size), max_lines=2, placeholder=" …")
        for title in ("image", *labels, "ground truth")
    ]
    top = 0.3 + 0.14 * ("\n" in "".join(titles))
    figure, axes = _sheet(slices, (len(slices), width), names, 0.0, top)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, loc="center", fontsize=9, pad=4)
    for line, part in enumerate(slices):
        own = rows[line * len(labels) : (line + 1) * len(labels)]
        here = axes[line * width : (line + 1) * width]
        corner = f"{own[0]['case']}\nz = {own[0]['z']:.0f}"
        draw_panel(here[0], part, None, names, letters=True)
        corner_text(here[0], corner, y=0.87)  # below the letter of the body's side
        for ax, row, prediction in zip(here[1:], own, part.predictions, strict=False):
            draw_panel(ax, part, prediction, names)
            corner_text(ax, f"{100 * row['dice']:.0f} %")
        draw_panel(here[-1], part, part.truth, names)
    return figure


def failures(group, folder) -> Picture:
    """Figure of the worst slices with organs in the test cases of the first finished run."""
    run = next(run for run in group.runs if run.cases)
    tests, names = TestSet(run), run.names
    found = []
    omitted: list[str] = []
    cases = dict.fromkeys(row["case"] for row in run.cases)
    for case_id, volume in _read_cases(tests, cases, [run], omitted):
        found += _worst_slices(case_id, volume, names)
    if not found:
        raise UserError("every slice with an organ is segmented perfectly")
    found.sort(key=lambda entry: entry[0])
    found = found[:_FAILURES]
    rows = _write_and_read(folder, "failures", [row for _, row, _ in found])
    slices = [part for _, _, part in found]
    return draw(
        lambda theme: _gallery(slices, rows, names),
        folder,
        "failures",
        "Worst slices",
        "Slices with the lowest mean Dice over the organs in truth or prediction, worst first "
        f"(ties: larger organs first); at most {_PER_CASE} per case, at least {_APART} slices "
        f"apart. Run: {group.label}, seed {run.config.seed}.{_omission_note(omitted)}",
        raster=True,
        alt=f"{len(rows)} CT slices where the prediction is worst: image, truth, prediction",
    )


def _worst_slices(case_id, volume: ScoredVolume, names):
    """Up to two (sort key, CSV row, Slice) per case."""
    image, truth, [prediction], spacing, region, directions = volume
    scores = slice_dice(prediction, truth, len(names))
    bearing = np.flatnonzero(np.isfinite(scores).any(axis=1) & region)
    area = np.count_nonzero((truth > 0) | (prediction > 0), axis=(1, 2))
    ranked = sorted((float(np.nanmean(scores[z])), -int(area[z]), int(z)) for z in bearing)
    kept: list[tuple] = []
    for key in (key for key in ranked if key[0] < 1):
        if len(kept) < _PER_CASE and all(abs(key[2] - other[2]) >= _APART for other in kept):
            kept.append(key)
    result = []
    for mean, size, z in kept:
        part = Slice(case_id, z, image[z], truth[z], spacing, [prediction[z]], directions)
        row = part.key | {"dice": mean, "organ_pixels": -size}
        row |= _worst_organ(scores[z], truth[z], prediction[z], names)
        result.append(((mean, size, case_id, z), row, part.cropped()))
    return result


def _worst_organ(scores, truth, prediction, names) -> dict:
    """CSV columns of the organ with the lowest Dice (ties: the largest) and its kind of error."""
    sizes = [[np.count_nonzero(m == k) for m in (truth, prediction)] for k in range(1, len(names))]
    known = np.flatnonzero(np.isfinite(scores))
    worst = min(known, key=lambda k: (scores[k], -sum(sizes[k])))
    true, predicted = sizes[worst]
    error = "missed" if not predicted else "hallucinated" if not true else "inaccurate"
    return {"organ": names[worst + 1], "organ_dice": float(scores[worst]), "error": error}


def _gallery(slices, rows, names):
    across = min(2, len(slices))
    layout = math.ceil(len(slices) / across), 3 * across
    figure, axes = _sheet(slices, layout, names, 0.24, top=0.1)
    for place, ax in enumerate(axes):  # widens the gap between the two halves
        box = ax.get_position(original=True)
        shift = (0.08 if place % layout[1] >= 3 else -0.04) / figure.get_figwidth()
        ax.set_position((box.x0 + shift, box.y0, box.width, box.height))
    for place, (part, row) in enumerate(zip(slices, rows, strict=True)):
        here = axes[3 * place : 3 * place + 3]
        organ, z = row["organ"].replace("_", " "), int(row["z"])
        score = f"{100 * row['organ_dice']:.0f} %" if row["error"] == "inaccurate" else row["error"]
        text = f"{row['case']}, z = {z}: Dice {100 * row['dice']:.0f} % (worst: {organ}, {score})"
        here[0].set_title(text, loc="left", fontsize=9, pad=4)
        for ax, labels in zip(here, (None, part.truth, part.predictions[0]), strict=True):
            draw_panel(ax, part, labels, names)
    for ax, what in zip(axes, ["image", "truth", "prediction"] * across, strict=False):
        overlays.write_on(ax, 0.5, 0.02, what, va="bottom")
    for ax in axes[3 * len(slices) :]:
        ax.set_visible(False)
    return figure


def _sheet(slices, layout, names, head, top):
    """Figure and axes for `layout` panels, all of the tallest slice's shape, with a legend."""
    tallest = max(frame_ratio(part.frame) for part in slices)
    maps = [labels for part in slices for labels in (part.truth, *part.predictions)]
    legend = overlays.present(names, *maps)
    return overlays.panels(
        layout, tallest, _panel_width(layout[1]), legend, names, head=head, top=top
    )


def _panel_width(columns: int) -> float:
    return min(2.6, _WIDE / columns)


def _mean_dice(prediction, truth, names) -> float:
    """Mean Dice over the organs in either map (H, W), NaN where there is none."""
    scores = slice_dice(prediction[None], truth[None], len(names))[0]
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan


def _write_and_read(folder, stem, rows) -> list[dict]:
    path = Path(folder) / f"{stem}.csv"
    write_rows(path, rows)
    return read_rows(path)
