"""The subject of a report: a run or an experiment grid, read once."""

from dataclasses import dataclass, replace
from pathlib import Path

from pgpsam_jax.checkpointing.frozen_weights import base_notice
from pgpsam_jax.config import from_json, to_json
from pgpsam_jax.methods import registry
from pgpsam_jax.report.figures.csv_rows import Group, groups_of
from pgpsam_jax.results.grid import Grid, is_grid, read_grid
from pgpsam_jax.results.runs import Run, read_run

_PHANTOM = "The data are synthetic phantoms: the results say nothing about real patients."


@dataclass(frozen=True)
class Subject:
    """`groups` are the rows of the source (one for a run)."""

    source: Run | Grid
    groups: list[Group]

    @classmethod
    def read(cls, folder, path_overrides: dict | None = None) -> "Subject":
        """Reads a folder; `UserError` if it is neither a workdir nor an experiment grid.

        path_overrides: as in `Run`, for all runs.
        """
        source: Run | Grid = read_grid(folder) if is_grid(folder) else read_run(folder)
        groups = []
        for group in groups_of(source):
            runs = (replace(run, path_overrides=path_overrides or {}) for run in group.runs)
            groups.append(replace(group, runs=tuple(runs)))
        return cls(source, groups)

    @property
    def title(self) -> str:
        source = self.source
        return source.title if isinstance(source, Grid) else source.config.name

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def scored(self) -> list[Group]:
        """The rows with scores."""
        return [group for group in self.groups if any(run.cases for run in group.runs)]

    @property
    def configs(self) -> dict[Path, dict]:
        """{workdir: stored configuration}, including cells that are only planned."""
        if isinstance(self.source, Grid):
            return {cell.folder: cell.config for cell in self.source.cells}
        return {self.source.workdir: to_json(self.source.config)}

    @property
    def notices(self) -> list[str]:
        """Caveats of the numbers: random backbone, phantoms, and notices of the runs."""
        found: list[str | None] = [text for run in self.runs for text in run.notices]
        for workdir, stored in self.configs.items():
            config = from_json(stored)
            found += [base_notice(config.model, workdir), registry.notice(config.model)]
            found.append(_PHANTOM if config.data.layout == "phantom" else None)
        return [text for text in dict.fromkeys(found) if text]
