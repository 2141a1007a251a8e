"""The charts of a report with their CSV files and captions."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from pgpsam_jax.report.figures import comparison, cost, csv_rows, training_curves
from pgpsam_jax.report.figures.picture import Picture, draw
from pgpsam_jax.visualization.theme import Theme

# {stem of the files: function of CSV rows and a theme}.
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
_POINTS = "Points: cases{seeds}; box: quartiles; line: median. Protocol: strict."


def redraw(folder, stem: str, theme: Theme) -> Figure:
    """Draws a chart from its CSV file alone."""
    return CHARTS[stem](csv_rows.read_rows(Path(folder) / f"{stem}.csv"), theme)


def comparison_charts(groups, axis: str | None, folder) -> list[Picture]:
    """Charts that compare the rows of an experiment grid; charts without data are omitted."""
    seeds, pictures = csv_rows.seed_rows(groups, axis), []
    if axis and any(row["value"] is not None for row in seeds):
        caption = (
            "Class-mean Dice (strict). Points: seeds; line: mean over seeds; whiskers: ± SD over "
            "seeds, none for a single seed."
        )
        pictures = _chart(folder, "axis", seeds, f"Dice vs. {axis}", caption)
    caption = (
        "Class-mean Dice (strict). Points: seeds; bar: mean over the n seeds; whiskers: two-sided "
        "95 % Student t interval of that mean, none for a single seed."
    )
    pictures += _chart(folder, "rows", seeds, "Rows", caption)
    caption = (
        "Dice of each case (mean over organs, then over the seeds that both rows share) minus that "
        "of the reference row. Points: cases; box: quartiles; line: median; better: number of "
        "cases above 0."
    )
    paired = csv_rows.paired_rows(groups)
    return pictures + _chart(folder, "differences", paired, "Paired differences", caption)


def distribution_charts(groups, folder) -> list[Picture]:
    """Charts of the Dice and HD95 of every organ, case by case."""
    seeds = ", averaged over seeds" if any(len(group.runs) > 1 for group in groups) else ""
    caption = _POINTS.format(seeds=seeds)
    distances = " Only cases in which both truth and prediction contain the organ."
    dice, hd95 = (csv_rows.score_rows(groups, metric) for metric in ("dice", "hd95"))
    pictures = _chart(folder, "dice_by_organ", dice, "Dice by organ", caption)
    return pictures + _chart(folder, "hd95_by_organ", hd95, "HD95 by organ", caption + distances)


def training_charts(groups, folder) -> list[Picture]:
    """Chart of losses, learning rate, gradient norm and throughput per step."""
    rows = csv_rows.curve_rows(groups)
    if len({(row["label"], row["seed"]) for row in rows}) > 1:
        caption = "Lines: mean over seeds, smoothed over 1/25 of the records; bands: their range."
    else:
        caption = "Faint lines: records; solid lines: running mean over 1/50 of the records."
    return _chart(folder, "training", rows, "Training curves", caption)


def cost_charts(groups, folder) -> list[Picture]:
    """Chart of Dice vs. compute, time and memory; none if all rows cost the same."""
    rows = csv_rows.cost_rows(groups)
    planned = {(row["forward_gflop"], row["training_gflop"], row["step_mib"]) for row in rows}
    if len(planned) < 2:
        return []
    caption = (
        "Class-mean Dice (strict). Large markers: mean over seeds at their median cost; small "
        "markers: seeds; whiskers: ± SD over seeds, none for a single seed."
    )
    return _chart(folder, "cost", rows, "Dice vs. cost", caption)


def timing_charts(groups, folder) -> list[Picture]:
    """Chart of the time spent on each activity."""
    several = any(len(group.runs) > 1 for group in groups)
    caption = f"Wall-clock time{', mean over seeds' if several else ''}."
    return _chart(folder, "timing", csv_rows.timing_rows(groups), "Time per activity", caption)


def _chart(folder, stem: str, rows, title: str, caption: str) -> list[Picture]:
    """Writes the rows as CSV and draws them; [] if there are none."""
    if not rows:
        return []
    csv_rows.write_rows(Path(folder) / f"{stem}.csv", rows)
    alt = f"Chart: {title}. The numbers are in {stem}.csv."
    return [draw(lambda theme: redraw(folder, stem, theme), folder, stem, title, caption, alt=alt)]
