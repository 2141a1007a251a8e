"""Experiment grids read back from disk: the plan, the states of the cells, the finished runs.

An *experiment grid* is a folder with `grid.json` (the plan: rows of a table, seeds, one cell per
run) and one run folder per cell; `experiments/run_grid.py` fills it.
"""

import dataclasses
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.results.runs import Run, read_run
from pgpsam_jax.utils.files import read_record

PLAN = "grid.json"
STATE = "state.json"
PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the grid's table: its overrides, and `value` if the rows form an axis."""

    name: str
    label: str
    overrides: dict
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid.

    config: resolved configuration as plain JSON. contents: digests of the files it names at
    planning time, `identity.content_digests`.
    """

    name: str
    row: str
    seed: int
    folder: Path
    config: dict
    contents: dict = dataclasses.field(default_factory=dict)

    @property
    def state(self) -> dict:
        """The content of `state.json`; `{"state": "pending"}` if there is none."""
        pending = {"state": PENDING}
        return read_record(self.folder / STATE, missing=pending, damaged=pending)

    def run(self) -> Run | None:
        """The run of a finished cell, else None."""
        return read_run(self.folder) if self.state["state"] == DONE else None


@dataclasses.dataclass(frozen=True)
class Grid:
    """The plan of a grid folder. `reference` names the row that others are compared with."""

    path: Path
    name: str
    title: str
    variant: str
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    reference: str
    published: str | None  # key of the paper's table to print beside, if it uses the same data set
    axis: str | None  # the quantity in `Row.value`
    notes: tuple[str, ...]
    code: dict  # `provenance.code_version()` of the program that planned it

    @classmethod
    def from_json(cls, plan: dict, path: Path) -> "Grid":
        """Parses the content of `grid.json` in the folder `path`."""
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
        """{row name: finished runs, one per seed}; [] for rows without any."""
        found: dict[str, list[Run]] = {row.name: [] for row in self.rows}
        for cell in self.cells:
            run = cell.run()
            if run is not None:
                found[cell.row].append(run)
        return found


def is_grid(path) -> bool:
    return (Path(path) / PLAN).is_file()


def read_grid(path) -> Grid:
    """Reads the plan of a grid folder; `UserError` if it is missing or damaged."""
    path = Path(path)
    grid = read_record(path / PLAN, lambda plan: Grid.from_json(plan, path))
    if grid is None:
        raise UserError(
            f"{path / PLAN} not found, so {path} is not an experiment grid; run one with "
            "pgpsam grid GRID --workdir FOLDER"
        )
    return grid
