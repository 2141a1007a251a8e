"""A grid as a SLURM job array: one task per cell, requeued tasks resume from their checkpoint."""

import shlex
import sys
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.runs import Cell, Grid

_SCRIPT = """#!/bin/bash
# {title}
# Submit from anywhere:  sbatch {path}
# Partition, account, time and GPU type are your cluster's: sbatch --partition=... {path}
# A preempted or requeued task goes on from its cell's last checkpoint. Cells that fail are named in
#   python -m experiments.run_grid --grid ... --workdir {folder} --dry-run
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{workers}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/slurm-%a.log
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
set -euo pipefail
cells=(
{cells}
)
cd {here}
exec {python} -m experiments.run_cell --workdir {folder} --cell "${{cells[$SLURM_ARRAY_TASK_ID]}}"
"""


def script(grid: Grid, cells: list[Cell], workers: int) -> str:
    """The text of the job-array script; `workers` tasks run at a time."""
    if not cells:
        raise UserError(f"{grid.path}: every cell is done or running; nothing to submit")
    folder = shlex.quote(str(grid.path.absolute()))
    return _SCRIPT.format(
        title=grid.title.replace("\n", " "),
        path=shlex.quote(str(grid.path.absolute() / "slurm.sh")),
        folder=folder,
        name=grid.name,
        last=len(cells) - 1,
        workers=workers,
        cells="\n".join(f"  {shlex.quote(cell.name)}" for cell in cells),
        here=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
    )
