"""Writes an experiment grid as a SLURM job array: one task per cell, resumed when requeued."""

import shlex
import sys
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.results.grid import Cell, Grid

_SCRIPT = """#!/bin/bash
# {title}
# Submit from anywhere:  sbatch {path}
# Partition, account, time and GPU type depend on your cluster: sbatch --partition=... {path}
# A preempted or requeued task resumes from the last checkpoint of its cell; a task close to its
# time limit saves a checkpoint and is requeued. To list the failed cells:
#   pgpsam grid ... --workdir {folder} --dry-run
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{workers}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/slurm-%a.log
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
set -euo pipefail
cells=(
{cells}
)
cd {here}
{python} -m pgpsam_jax.cli cell --workdir {folder} --cell "${{cells[$SLURM_ARRAY_TASK_ID]}}" &
cell=$!
ending=
trap 'ending=1; kill -USR1 "$cell"' USR1
trap 'kill -TERM "$cell"' TERM
code=0
while kill -0 "$cell" 2>/dev/null; do  # a signal interrupts wait, not the cell
    wait "$cell" || true
done
wait "$cell" || code=$?
if [[ $ending ]] && (( code )); then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


def script(grid: Grid, cells: list[Cell], workers: int) -> str:
    """Returns the job-array script, with `workers` tasks at a time."""
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
