"""Tables of a study's rows vs. its reference row: the mean over organs, and per organ.

Differences are row minus reference in Dice points (hundredths), protocol `strict`.
"""

import math

from pgpsam_jax.results.tables.statistics import (
    DIFFERENCE_INTERVAL,
    Comparison,
    compare,
    comparison_notes,
    data_notes,
    group_notes,
    holm,
    sample_notes,
)
from pgpsam_jax.results.tables.study import Study
from pgpsam_jax.results.tables.text import NONE, Table, display_name, interval, percent

PROTOCOL, METRIC = "strict", "dice"


def comparison_table(study: Study) -> Table:
    """Table of case-mean differences from the reference row, with CI, p and Holm p."""
    head = ["row", "seeds", "n", "row mean", "reference mean", "difference", "by seed", "95 % CI"]
    head += ["p", "Holm p", "better / worse / same"]
    found, adjusted = _comparisons(study, [None])
    rows = []
    for ((label, _), one), p in zip(found.items(), adjusted, strict=True):
        if one is None:
            rows.append([label] + [NONE] * (len(head) - 1))
            continue
        cells = [label, str(len(one.seeds)), str(one.n), percent(one.row), percent(one.reference)]
        cells += [_signed_percent(one.difference), ", ".join(map(_signed_percent, one.by_seed))]
        cells += [interval(one.interval, _signed_percent), _p(one.p), _p(p)]
        rows.append([*cells, f"{one.better} / {one.worse} / {one.same}"])
    notes = [
        "A case's score is its mean over organs (case mean), averaged over the seeds that row and "
        "reference share; difference: row minus reference in Dice points, over the n cases they "
        f"share; by seed: the difference for each seed. CI: {DIFFERENCE_INTERVAL}."
    ]
    return Table(_title(study, "case mean"), head, rows, notes + _notes(study, found))


def organ_table(study: Study, organs) -> Table:
    """Table of rows x organs: the difference and its Holm p; all cells are one family."""
    found, adjusted = _comparisons(study, organs)
    cells = {
        key: NONE if one is None else f"{_signed_percent(one.difference)} ({_p(p)})"
        for (key, one), p in zip(found.items(), adjusted, strict=True)
    }
    labels = dict.fromkeys(label for label, _ in found)
    rows = [[label, *(cells[label, organ] for organ in organs)] for label in labels]
    notes = ["Cells: difference in Dice points (Holm p, corrected over all rows and organs)."]
    counts = sorted({one.n for one in found.values() if one is not None})
    if counts:
        each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        notes.append(f"n = {each} cases in which the organ has a Dice in both row and reference.")
    head = ["row", *(display_name(organ) for organ in organs)]
    return Table(_title(study, "per organ"), head, rows, notes + _notes(study, found))


def _comparisons(study: Study, organs) -> tuple[dict[tuple, Comparison | None], list[float]]:
    """{(row label, organ or None for the mean over organs): comparison}, and their Holm p.

    A comparison is None, and its p NaN, if there are no results.
    """
    scores = {line.name: line.scores(PROTOCOL, METRIC) for line in study.lines}
    reference = scores.get(study.reference)
    found = {
        (line.label, organ): compare(scores[line.name], reference, organ)
        for line in study.lines
        if line.name != study.reference
        for organ in organs
    }
    return found, holm([math.nan if one is None else one.p for one in found.values()])


def _notes(study: Study, found) -> list[str]:
    lines = {line.label: line.cases for line in study.lines if line.runs}
    comparisons = [one for one in found.values() if one is not None]
    if not any(line.name == study.reference for line in study.lines if line.runs):
        return ["The reference row has no results yet, so there are no comparisons."]
    scored = [line.scores(PROTOCOL, METRIC) for line in study.lines]
    notes = group_notes([one for one in scored if one is not None])
    counts = [one.n for one in comparisons], [len(one.seeds) for one in comparisons]
    unpaired = {label for label, _ in found if label in lines}
    unpaired -= {label for (label, _), one in found.items() if one is not None}
    notes += [
        f"Warning: {label} shares no seed and case with the reference row."
        for label in lines
        if label in unpaired
    ]
    return comparison_notes(comparisons) + notes + sample_notes(*counts) + data_notes(lines)


def _title(study: Study, what: str) -> str:
    labels = {line.name: line.label for line in study.lines}
    reference = labels.get(study.reference, study.reference)
    return f"{study.title}: rows vs. “{reference}”, Dice (`{PROTOCOL}`), {what}"


def _signed_percent(value) -> str:
    return percent(value, sign=True)


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"
