"""Rows of the CSV files behind the charts.

A run is treated as an experiment grid of one row: all functions take `Group`s. Rows are flat
dictionaries. Each file holds all the numbers of its chart, which can be redrawn from it alone.
"""

import csv
import dataclasses
from collections.abc import Iterator

import numpy as np

from pgpsam_jax.metrics.aggregate import Scores, class_mean, gather
from pgpsam_jax.results.grid import Grid
from pgpsam_jax.results.runs import Run
from pgpsam_jax.results.tables.cost_table import quantities
from pgpsam_jax.utils.files import csv_text, write_text
from pgpsam_jax.visualization.training_curve import curves_of

# Columns of text; all others hold numbers.
_TEXT = frozenset(
    "label class case metric axis against key activity organ error map other prototypes "
    "with".split()
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed: one row of an experiment grid, or a single run."""

    label: str
    runs: tuple[Run, ...]
    value: float | None = None
    reference: bool = False


def groups_of(source: Run | Grid) -> list[Group]:
    """Groups of a grid, one per row with its finished runs, or a single run as the only group."""
    if isinstance(source, Run):
        return [Group(source.config.name, (source,))]
    runs = source.runs()
    labels = [row.label for row in source.rows]
    return [
        Group(
            row.label if labels.count(row.label) == 1 else f"{row.label} ({row.name})",
            tuple(runs[row.name]),
            row.value,
            row.name == source.reference,
        )
        for row in source.rows
    ]


def scores_of(group: Group, metric: str = "dice") -> Scores | None:
    """Scores of the group under protocol `strict`; None if no run was evaluated."""
    groups = {case: name for run in group.runs for case, name in run.groups.items()}
    cases = {run.config.seed: run.cases for run in group.runs}
    return gather(cases, "strict", metric, groups)


def _scored(groups, metric: str = "dice") -> Iterator[tuple[Group, Scores]]:
    """Yields each group that has scores, with them."""
    for group in groups:
        if (scores := scores_of(group, metric)) is not None:
            yield group, scores


def score_rows(groups, metric: str) -> list[dict]:
    """Rows of the metric per organ and case, averaged over the seeds in which it is defined."""
    rows = []
    for group, scores in _scored(groups, metric):
        ids = {row["class"]: row["class_id"] for run in group.runs for row in run.cases}
        means = scores.per_case()
        rows += [
            {"label": group.label, "class_id": ids[organ], "class": organ, "case": case}
            | {"metric": metric, "value": means[i, j], "seeds": len(scores.seeds)}
            for j, organ in enumerate(scores.organs)
            for i, case in enumerate(scores.cases)
        ]
    return rows


def seed_rows(groups, axis: str | None) -> list[dict]:
    """Rows of the class-mean Dice per seed."""
    rows = []
    for group, scores in _scored(groups):
        rows += [
            {"label": group.label, "seed": seed, "dice_class_mean": mean}
            | {"axis": axis or "", "value": group.value, "reference": int(group.reference)}
            for seed, mean in zip(scores.seeds, class_mean(scores.values), strict=True)
        ]
    return rows


def paired_rows(groups) -> list[dict]:
    """Rows of each case's Dice (mean over organs, then seeds) minus that of the reference row.

    Uses the seeds, cases and organs that both share, as in `statistics.compare`.
    """
    scored = list(_scored(groups))
    references = [pair for pair in scored if pair[0].reference]
    if not references:
        return []
    base, theirs = references[0]
    rows = []
    for group, ours in scored:
        first, second = ours.common_with(theirs)
        if group is base or not first.values.size:
            continue
        differences = first.case_scores() - second.case_scores()
        rows += [
            {"label": group.label, "against": base.label, "case": case}
            | {"difference": difference, "seeds": len(first.seeds)}
            for case, difference in zip(first.cases, differences, strict=True)
        ]
    return rows


def curve_rows(groups) -> list[dict]:
    """Rows of the numbers in `metrics.jsonl`, at most 400 per curve."""
    rows = []
    for group in groups:
        for run in group.runs:
            origin = {"label": group.label, "seed": run.config.seed}
            for key, points in curves_of(run.records).items():
                rows += [origin | {"step": s, "key": key, "value": value} for s, value in points]
    return rows


def timing_rows(groups) -> list[dict]:
    """Rows of seconds per activity, averaged over the runs that recorded them."""
    rows = []
    for group in groups:
        timings = [run.timing for run in group.runs if run.timing]
        for activity in dict.fromkeys(key for timing in timings for key in timing):
            seconds = [t.get(activity, 0.0) for t in timings]
            row = {"label": group.label, "activity": activity}
            rows.append(row | {"seconds": float(np.mean(seconds)), "runs": len(seconds)})
    return rows


def cost_rows(groups) -> list[dict]:
    """Rows of class-mean Dice and cost per seed that has both."""
    rows = []
    for group in groups:
        costs = {run.config.seed: quantities(run) for run in group.runs if run.cost}
        rows += [
            {key: row[key] for key in ("label", "seed", "dice_class_mean")} | costs[row["seed"]]
            for row in seed_rows([group], None)
            if row["seed"] in costs
        ]
    return rows


def write_rows(path, rows) -> None:
    """Writes rows as CSV: floats in full precision, None and NaN as empty fields."""
    filled = (
        {key: "" if value is None or value != value else value for key, value in row.items()}
        for row in rows
    )
    write_text(path, csv_text(list(rows[0]), filled))


def read_rows(path) -> list[dict]:
    """Reads a file of `write_rows`: columns in `_TEXT` as text, others as floats, NaN if empty."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {key: text if key in _TEXT else float(text or "nan") for key, text in row.items()}
            for row in csv.DictReader(file)
        ]


def read_columns(path) -> dict[str, np.ndarray]:
    """Reads a file of `write_rows` as {column: array}, dtype object for text."""
    rows = read_rows(path)
    return {
        key: np.array([row[key] for row in rows], object if key in _TEXT else float)
        for key in rows[0]
    }
