"""Runs the cells of an experiment grid, several at a time; the same command runs the missing ones.

A cell is a run folder `<row>-seed<n>-<hash of its settings>` with its own log. Interrupted cells
resume from their last checkpoint, failed ones are retried. Exit code 0: all done.

Examples:
  python -m experiments.run_grid table3:phantom --workdir runs/table3
  python -m experiments.run_grid --grid experiments/grids/table3.py --workdir runs/btcv \\
      --set data.root=datasets/BTCV --workers 2 --only 'ppr-*'
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.runtime.cli import Parser
from pgpsam_jax.utils.files import write_text

if TYPE_CHECKING:
    from pgpsam_jax.results.grid import Cell, Grid


def listing(grid: Grid, cells: list[Cell]) -> str:
    """Lists every cell with its state and folder, for `--dry-run`."""
    from experiments.run_cell import standing

    lines = [f"{grid.name}: {grid.title}", f"{len(cells)} cells in {grid.path}"]
    for cell in cells:
        state = cell.state
        detail = state.get("reason") or state.get("note") or ""
        lines.append(f"{standing(cell):8} {cell.name:28} {cell.folder.name}  {detail}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = Parser("experiments.run_grid", __doc__)
    parser.add_argument(
        "grid",
        nargs="?",
        default=argparse.SUPPRESS,  # --grid sets the same
        help="grid file, or the name of a shipped one; NAME:VARIANT for a variant",
    )
    parser.add_argument("--grid", metavar="GRID", help=argparse.SUPPRESS)
    parser.add_argument("--workdir", help="folder of the grid; default runs/<grid>")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and run nothing")
    parser.add_argument("--max-failures", type=int, help="stop after this many failed cells")
    parser.add_argument("--only", default="*", help="cells whose name matches, such as 'ppr-*'")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting for all cells"
    )
    parser.add_argument("--mix", action="store_true", help="continue with changed settings or code")
    parser.add_argument("--slurm", action="store_true", help="write a job-array script instead")
    with exit_on_user_error():  # the scheduler handles signals: it ends its cells
        sys.exit(_run(parser.parse_args()))


def _run(arguments) -> int:
    from experiments.grid import slurm  # slow: after --help
    from experiments.grid.plan import make_grid, parse_settings, write_plan
    from experiments.grid.scheduler import Scheduler
    from experiments.run_cell import standing
    from pgpsam_jax.results.grid import DONE, RUNNING

    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; give 1 or more")
    if arguments.grid is None:
        raise UserError("no grid; give a grid file or the name of a shipped grid, such as table3")
    name = Path(arguments.grid).name.replace(".py", "").replace(":", "_")
    folder = Path(arguments.workdir or f"runs/{name}")
    settings = {"data.cache_dir": str(folder / "cache")} | parse_settings(arguments.set)
    grid = make_grid(arguments.grid, folder, settings)
    cells = [cell for cell in grid.cells if fnmatch.fnmatch(cell.name, arguments.only)]
    if not cells:
        names = ", ".join(cell.name for cell in grid.cells)
        raise UserError(f"--only {arguments.only!r} matches no cell; there are {names}")
    if arguments.dry_run:
        print(listing(grid, cells))
        return 0
    grid = write_plan(grid, arguments.mix)
    chosen = {cell.name for cell in cells}
    cells = [cell for cell in grid.cells if cell.name in chosen]
    if arguments.slurm:
        todo = [cell for cell in cells if standing(cell) not in (DONE, RUNNING)]
        path = folder / "slurm.sh"
        write_text(path, slurm.script(grid, todo, arguments.workers))
        print(f"{path}: {len(todo)} cells; submit it with sbatch {path}")
        return 0
    complete = Scheduler(grid, cells, arguments.workers, arguments.max_failures).run()
    print(listing(grid, cells))
    return 0 if complete else 1


if __name__ == "__main__":
    main()
