"""What training and grids leave on disk, read back: for tables, reports and notebooks.

A *run* is a workdir of `pgpsam_jax.main`. A *grid* is a folder with `grid.json` (the plan: rows of
a table, seeds, one cell per run) and one run folder per cell; `experiments/run_grid.py` fills it.
"""

import dataclasses
import json
import re
from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import read_json, read_metrics

PLAN = "grid.json"
STATE = "state.json"
PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir. What a run has not written yet is empty: `{}`, `[]` or None."""

    workdir: Path
    config: ConfigDict
    names: tuple[str, ...]  # K class names, background first
    provenance: dict
    timing: dict  # seconds by activity
    cost: dict  # cost.json: parameters, FLOPs, memory, seconds per step
    records: list[dict]  # of metrics.jsonl
    cases: list[dict]  # rows of evaluation/cases.csv
    summary: dict | None  # evaluation/summary.json
    list_hash: str | None  # of the few-shot slices
    # Paths that the reader gave where files are elsewhere now: "data.root", "model.base".
    given: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the grid's table: its overrides, and `value` where rows form an axis."""

    name: str
    label: str
    overrides: dict
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid. `config` is the resolved configuration as plain JSON.

    contents: what the files that it names held when it was planned, `identity.contents`.
    """

    name: str
    row: str
    seed: int
    folder: Path
    config: dict
    contents: dict = dataclasses.field(default_factory=dict)

    @property
    def state(self) -> dict:
        """The content of `state.json`; `{"state": "pending"}` where there is none."""
        try:
            return json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"state": PENDING}

    def run(self) -> Run | None:
        """The run of a done cell, else None."""
        return read_run(self.folder) if self.state["state"] == DONE else None


@dataclasses.dataclass(frozen=True)
class Grid:
    """The plan of a grid folder. `reference` names the row others are compared with."""

    path: Path
    name: str
    title: str
    variant: str
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    reference: str
    published: str | None  # key of the paper's table to print beside, if its data set is ours
    axis: str | None  # what `Row.value` counts
    notes: tuple[str, ...]
    code: dict  # `provenance.code_version()` of the program that planned it

    @classmethod
    def from_json(cls, plan: dict, path: Path) -> "Grid":
        """The content of `grid.json` in the folder `path`."""
        lists = {
            "rows": tuple(Row(**row) for row in plan["rows"]),
            "cells": tuple(Cell(**c | {"folder": path / c["folder"]}) for c in plan["cells"]),
            "notes": tuple(plan["notes"]),
        }
        return cls(path=path, **plan | lists)

    def to_json(self) -> dict:
        plan = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del plan["path"]
        cells = [dataclasses.asdict(c) | {"folder": c.folder.name} for c in self.cells]
        rows = [dataclasses.asdict(row) for row in self.rows]
        return plan | {"rows": rows, "cells": cells, "notes": list(self.notes)}

    def runs(self) -> dict[str, list[Run]]:
        """Row name -> its finished runs, one per seed; a row without any has []."""
        found = {row.name: [] for row in self.rows}
        for cell in self.cells:
            run = cell.run()
            if run is not None:
                found[cell.row].append(run)
        return found


def is_grid(path) -> bool:
    return (Path(path) / PLAN).is_file()


def read_run(workdir) -> Run:
    """A workdir's settings and whatever results it holds; `UserError` if it is none."""
    from pgpsam_jax.metrics.summary import read_cases

    workdir = Path(workdir)
    config = configuration.load_config(workdir)
    evaluation = workdir / "evaluation"
    cases = evaluation / "cases.csv"
    return Run(
        workdir,
        config,
        tuple(load_label_table(workdir / "labels.json").names),
        read_json(workdir / "provenance.json") or {},
        read_json(workdir / "timing.json") or {},
        read_json(workdir / "cost.json") or {},
        read_metrics(workdir / "metrics.jsonl"),
        read_cases(cases) if cases.is_file() else [],
        read_json(evaluation / "summary.json"),
        _list_hash(workdir / "fewshot.txt"),
    )


def read_grid(path) -> Grid:
    """The plan of a grid folder; `UserError` if it has none or it is damaged."""
    path = Path(path)
    plan = read_json(path / PLAN)
    if plan is None:
        raise UserError(
            f"{path / PLAN} not found, so {path} is no grid; fill one with "
            "python -m experiments.run_grid --grid GRID --workdir FOLDER"
        )
    try:
        return Grid.from_json(plan, path)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / PLAN} is damaged ({error!r}); restore it from a copy") from None


def _list_hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    match = re.search(r"^# hash: ([0-9a-f]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None
