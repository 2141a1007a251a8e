"""The input of tables: lines of runs, from an experiment grid or from single run folders."""

import dataclasses
import json
from collections import Counter

from pgpsam_jax.checkpointing import identity
from pgpsam_jax.config import serialization
from pgpsam_jax.metrics.aggregate import Scores, gather
from pgpsam_jax.metrics.protocols import COLUMNS
from pgpsam_jax.results.grid import DONE, Grid
from pgpsam_jax.results.runs import Run

# `row_value` is the row's value on the grid's axis; columns from "case" on are those of cases.csv.
LONG_COLUMNS = ("grid", "row", "label", "row_value", "seed", *COLUMNS)


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the tables: {seed: run} of its evaluated runs, of `planned` ones."""

    name: str
    label: str
    value: float | None
    planned: int
    runs: dict
    config: dict  # resolved, as plain JSON; of its first seed

    @property
    def cases(self) -> dict:
        """{seed: rows of cases.csv}."""
        return {seed: run.cases for seed, run in self.runs.items()}

    def scores(self, protocol: str, metric: str) -> Scores | None:
        """The scores of all seeds; None if there are none."""
        groups = {case: g for run in self.runs.values() for case, g in run.groups.items()}
        return gather(self.cases, protocol, metric, groups)


@dataclasses.dataclass(frozen=True)
class Study:
    """Lines in planned order; `reference` names the line that others are compared with."""

    name: str
    title: str
    lines: tuple[Line, ...]
    reference: str
    published: str | None
    notes: tuple[str, ...]


def from_grid(grid: Grid) -> Study:
    """The study of an experiment grid, finished or not."""
    lines, states = [], Counter[str]()
    for row in grid.rows:
        cells = [cell for cell in grid.cells if cell.row == row.name]
        runs = {cell.seed: (cell.state["state"], cell.run()) for cell in cells}
        for state, run in runs.values():
            unscored = state == DONE and not (run and run.cases)
            states["done but not evaluated" if unscored else state] += 1
        evaluated = {seed: run for seed, (_, run) in runs.items() if run and run.cases}
        config = cells[0].config if cells else {}
        lines.append(Line(row.name, row.label, row.value, len(cells), evaluated, config))
    notes = list(grid.notes)
    if states[DONE] < states.total():
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        notes.append(f"Unfinished: of {states.total()} runs {counts}; rows without results show -.")
    variant = f" ({grid.variant})" if grid.variant and grid.variant not in grid.title else ""
    notes += _run_notes(lines)
    title = grid.title + variant
    return Study(grid.name, title, tuple(lines), grid.reference, grid.published, tuple(notes))


def from_runs(runs: list[Run]) -> Study:
    """The study of run folders; runs whose configurations differ only in seeds share a line."""
    groups: list[tuple[str, dict]] = []
    for run in runs:
        key, seed = _key_without_seed(run), _seed(run)
        for other, members in groups:
            if other == key and seed not in members:
                members[seed] = run
                break
        else:
            groups.append((key, {seed: run}))
    labels = _labels([next(iter(members.values())) for _, members in groups])
    lines = []
    for label, (_, members) in zip(labels, groups, strict=True):
        evaluated = {seed: run for seed, run in members.items() if run.cases}
        config = serialization.to_json(next(iter(members.values())).config)
        lines.append(Line(label, label, None, len(members), evaluated, config))
    notes = tuple(_run_notes(lines))
    return Study("runs", "Runs", tuple(lines), lines[0].name, None, notes)


def long_rows(study: Study) -> list[dict]:
    """All scores, one per dictionary with the keys `LONG_COLUMNS`."""
    rows = []
    for line in study.lines:
        value = "" if line.value is None else line.value
        for seed, run in line.runs.items():
            origin = (study.name, line.name, line.label, value, seed)
            start = dict(zip(LONG_COLUMNS, origin, strict=False))
            rows += [start | row for row in run.cases]
    return rows


def nsd_tolerance(run: Run) -> float:
    """The NSD tolerance of the run's scores, in mm."""
    recorded = run.summary.get("nsd_tolerance_mm")
    return float(run.config.eval.nsd_tolerance_mm if recorded is None else recorded)


def _run_notes(lines) -> list[str]:
    """Notices of the evaluations, and notes on differences between the runs."""
    runs = [run for line in lines for run in line.runs.values()]
    notices = Counter(" ".join(str(notice).split()) for run in runs for notice in run.notices)
    notes = [
        f"Note{'' if count == len(runs) else f' ({count} of {len(runs)} runs)'}: {notice}"
        for notice, count in notices.items()
    ]
    # Hash of the code that affects results; older runs only recorded the commit.
    versions = {run.provenance.get("code") or run.provenance.get("git") for run in runs}
    if len(versions) > 1:
        names = ", ".join(sorted(str(version)[:7] for version in versions))
        notes.append(f"Warning: the runs come from {len(versions)} versions of the code ({names}).")
    lists = [{run.list_hash for run in line.runs.values()} for line in lines if len(line.runs) > 1]
    lists = [hashes for hashes in lists if None not in hashes]
    if lists and all(len(hashes) == 1 for hashes in lists):
        notes.append(
            "The seeds of a row share its few-shot list: the SD over seeds reflects training only."
        )
    elif lists:
        notes.append(
            "Each seed of a row has its own few-shot list: the SD over seeds reflects both slices "
            "and training."
        )
    return notes


def _key_without_seed(run: Run) -> str:
    """Key of the inputs that determine a run's results, except for seeds."""
    excluded = (*identity.NO_IDENTITY, "seed", "fewshot.seed", "eval.")
    fields = serialization.flatten(serialization.to_json(run.config))
    fields = {key: value for key, value in fields.items() if not key.startswith(excluded)}
    inputs = {key: run.provenance.get(key) for key in ("data", "test", "base", "cnn_base")}
    return json.dumps([fields, run.names, inputs], sort_keys=True)


def _seed(run: Run):
    """The seed, with that of the few-shot list if it is set separately."""
    seed, of_list = run.config.seed, run.config.fewshot.seed
    return seed if of_list is None else f"{seed}/{of_list}"


def _labels(runs) -> list[str]:
    """Configuration names, folder names or paths: the first that are unique."""
    for names in ([run.config.name for run in runs], [run.workdir.name for run in runs]):
        if len(set(names)) == len(runs):
            return names
    return [f"{run.workdir}" for run in runs]
