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
    seeds, paired = csv_rows.seed_rows(groups, axis), csv_rows.paired_rows(groups)
    entries = [
        (
            "rows",
            seeds,
            "Rows",
            "Class-mean Dice (strict). Points: seeds; bar: mean over the n seeds; whiskers: "
            "two-sided 95 % Student t interval of that mean, none for a single seed.",
        ),
        (
            "differences",
            paired,
            "Paired differences",
            "Dice of each case (mean over organs, then over the seeds that both rows share) minus "
            "that of the reference row. Points: cases; box: quartiles; line: median; better: "
            "number of cases above 0.",
        ),
    ]
    if axis and any(row["value"] is not None for row in seeds):
        caption = (
            "Class-mean Dice (strict). Points: seeds; line: mean over seeds; whiskers: ± SD over "
            "seeds, none for a single seed."
        )
        entries.insert(0, ("axis", seeds, f"Dice vs. {axis}", caption))
    return _pictures(entries, folder)


def distribution_charts(groups, folder) -> list[Picture]:
    """Charts of the Dice and HD95 of every organ, case by case."""
    seeds = ", averaged over seeds" if any(len(group.runs) > 1 for group in groups) else ""
    caption = _POINTS.format(seeds=seeds)
    distances = " Only cases in which both truth and prediction contain the organ."
    entries = [
        ("dice_by_organ", csv_rows.score_rows(groups, "dice"), "Dice by organ", caption),
        (
            "hd95_by_organ",
            csv_rows.score_rows(groups, "hd95"),
            "HD95 by organ",
            caption + distances,
        ),
    ]
    return _pictures(entries, folder)


def training_charts(groups, folder) -> list[Picture]:
    """Chart of losses, learning rate, gradient norm and throughput per step."""
    rows = csv_rows.curve_rows(groups)
    if len({(row["label"], row["seed"]) for row in rows}) > 1:
        caption = "Lines: mean over seeds, smoothed over 1/25 of the records; bands: their range."
    else:
        caption = "Faint lines: records; solid lines: running mean over 1/50 of the records."
    return _pictures([("training", rows, "Training curves", caption)], folder)


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
    return _pictures([("cost", rows, "Dice vs. cost", caption)], folder)


def timing_charts(groups, folder) -> list[Picture]:
    """Chart of the time spent on each activity."""
    several = any(len(group.runs) > 1 for group in groups)
    caption = f"Wall-clock time{', mean over seeds' if several else ''}."
    return _pictures(
        [("timing", csv_rows.timing_rows(groups), "Time per activity", caption)], folder
    )


def _pictures(entries, folder) -> list[Picture]:
    pictures = []
    for stem, rows, title, caption in entries:
        if rows:
            csv_rows.write_rows(Path(folder) / f"{stem}.csv", rows)
            alt = f"Chart: {title}. The numbers are in {stem}.csv."
            make = lambda theme, stem=stem: redraw(folder, stem, theme)  # noqa: E731
            pictures.append(draw(make, folder, stem, title, caption, alt=alt))
    return pictures
