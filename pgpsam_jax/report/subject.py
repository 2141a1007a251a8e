"""What a report is about: a run or a grid, read once."""

import dataclasses
from pathlib import Path

from pgpsam_jax.checkpointing.frozen_weights import base_notice
from pgpsam_jax.config import from_json, to_json
from pgpsam_jax.methods import registry
from pgpsam_jax.report.figures.csv_rows import Group, groups_of
from pgpsam_jax.results.grid import Grid, is_grid, read_grid
from pgpsam_jax.results.runs import Run, read_run

_PHANTOM = "The data are computed phantoms, not patients: no claim about real images."


@dataclasses.dataclass(frozen=True)
class Subject:
    """`run` or `grid`, the other is None; `groups` are its rows (one for a run)."""

    run: Run | None
    grid: Grid | None
    groups: list[Group]

    @classmethod
    def read(cls, folder, given: dict | None = None) -> "Subject":
        """From a folder; `UserError` if it is neither a workdir nor a grid.

        given: as of `Run`, for all runs.
        """
        run, grid = (None, read_grid(folder)) if is_grid(folder) else (read_run(folder), None)
        groups = [
            dataclasses.replace(
                group, runs=tuple(dataclasses.replace(r, given=given or {}) for r in group.runs)
            )
            for group in groups_of(run or grid)
        ]
        return cls(run, grid, groups)

    @property
    def title(self) -> str:
        return self.grid.title if self.grid else self.run.config.name

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def scored(self) -> list[Group]:
        """The rows with results."""
        return [group for group in self.groups if any(run.cases for run in group.runs)]

    @property
    def configs(self) -> dict[Path, dict]:
        """Stored configurations by workdir, of planned cells too."""
        if self.grid:
            return {cell.folder: cell.config for cell in self.grid.cells}
        return {self.run.workdir: to_json(self.run.config)}

    @property
    def notices(self) -> list[str]:
        """What to know before the numbers: random backbone, phantoms, and the runs' own."""
        found = [text for run in self.runs for text in (run.summary or {}).get("notices", ())]
        for workdir, stored in self.configs.items():
            config = from_json(stored)
            found += [base_notice(config.model, workdir), registry.notice(config.model)]
            found.append(_PHANTOM if config.data.layout == "phantom" else None)
        return [text for text in dict.fromkeys(found) if text]
