"""The charts of a report: which there are, their CSV files, and what is written below them."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from pgpsam_jax.report.figures import comparison, cost, csv_rows, training_curves
from pgpsam_jax.report.figures.picture import Picture, draw
from pgpsam_jax.visualization.theme import Theme

# Every chart by the stem of its files: rows of the CSV and a theme to a figure.
CHARTS: dict[str, Callable[[list[dict], Theme], Figure]] = {
    "rows": comparison.comparison,
    "differences": comparison.differences,
    "axis": comparison.axis_curve,
    "dice_by_organ": comparison.distribution,
    "hd95_by_organ": comparison.distribution,
    "training": training_curves.training,
    "cost": cost.dice_against_cost,
    "timing": comparison.timing,
}
_POINTS = "Every point is a case{seeds}; box: quartiles, line: median. Protocol strict."


def redraw(folder, stem: str, theme: Theme) -> Figure:
    """A chart from its CSV file alone."""
    return CHARTS[stem](csv_rows.read_rows(Path(folder) / f"{stem}.csv"), theme)


def comparison_charts(groups, axis: str | None, folder) -> list[Picture]:
    """The rows of a grid against each other; what has no data yet is left out."""
    seeds, paired = csv_rows.seed_rows(groups, axis), csv_rows.paired_rows(groups)
    entries = [
        (
            "rows",
            seeds,
            "Rows",
            "Class mean of Dice (strict). Points: seeds; bar: their mean; whiskers: two-sided "
            "95 % Student t interval of the mean over seeds (n), none for one seed.",
        ),
        (
            "differences",
            paired,
            "Paired differences",
            "Dice of each case (mean over organs, then over the seeds both rows have) minus that "
            "of the reference row. Points: cases; box: quartiles, line: median; better: cases "
            "above 0.",
        ),
    ]
    if axis and any(row["value"] is not None for row in seeds):
        caption = (
            "Class mean of Dice (strict). Points: seeds; line: their mean; whiskers: ± SD over "
            "seeds, none for one seed."
        )
        entries.insert(0, ("axis", seeds, f"Dice against {axis}", caption))
    return _drawn(entries, folder)


def distribution_charts(groups, folder) -> list[Picture]:
    """Dice and HD95 of every organ, case by case."""
    seeds = ", averaged over seeds" if any(len(group.runs) > 1 for group in groups) else ""
    caption = _POINTS.format(seeds=seeds)
    distances = " Only cases in which truth and prediction both have the organ."
    entries = [
        ("dice_by_organ", csv_rows.score_rows(groups, "dice"), "Dice by organ", caption),
        (
            "hd95_by_organ",
            csv_rows.score_rows(groups, "hd95"),
            "HD95 by organ",
            caption + distances,
        ),
    ]
    return _drawn(entries, folder)


def training_charts(groups, folder) -> list[Picture]:
    """Losses, learning rate, gradient norm and throughput against the step."""
    rows = csv_rows.curve_rows(groups)
    if len({(row["label"], row["seed"]) for row in rows}) > 1:
        caption = "Line: mean over seeds, smoothed over a 25th of the records; band: their range."
    else:
        caption = "Faint: the records; strong: their running mean over a 50th of them."
    return _drawn([("training", rows, "Training curves", caption)], folder)


def cost_charts(groups, folder) -> list[Picture]:
    """Dice against compute, time and memory; left out where the rows do not differ in cost."""
    rows = csv_rows.cost_rows(groups)
    planned = {(row["forward_gflop"], row["training_gflop"], row["step_mib"]) for row in rows}
    if len(planned) < 2:
        return []
    caption = (
        "Class mean of Dice (strict). Large: mean over seeds, at the median of their cost; small: "
        "seeds; whiskers: ± SD over seeds, none for one seed."
    )
    return _drawn([("cost", rows, "Dice against cost", caption)], folder)


def timing_charts(groups, folder) -> list[Picture]:
    """Where the time of a run went."""
    several = any(len(group.runs) > 1 for group in groups)
    caption = f"Wall-clock time by activity{', mean over seeds' if several else ''}."
    return _drawn([("timing", csv_rows.timing_rows(groups), "Timing split", caption)], folder)


def _drawn(entries, folder) -> list[Picture]:
    pictures = []
    for stem, rows, title, caption in entries:
        if rows:
            csv_rows.write_rows(Path(folder) / f"{stem}.csv", rows)
            alt = f"Chart: {title}. The numbers are in {stem}.csv."
            make = lambda theme, stem=stem: redraw(folder, stem, theme)  # noqa: E731
            pictures.append(draw(make, folder, stem, title, caption, alt=alt))
    return pictures
