#!/usr/bin/env bash
# One run on the GPUs of a SLURM allocation.
#
#   sbatch --nodes=2 --gpus-per-node=4 --time=08:00:00 experiments/launch/slurm.sh \
#       --config configs/synapse.py --workdir /shared/runs/synapse
#
# Submit from the checkout, which all nodes must see. The script's arguments go to pgpsam_jax.main;
# --workdir must be on a file system that all nodes share. Partition, account and the like are
# options of sbatch. By default one task per node uses all of its GPUs;
# --ntasks-per-node=4 --gpus-per-task=1 starts one task per GPU. PYTHON=/path/to/python replaces
# .venv/bin/python.
#
# The job returns to the queue when it is preempted, when a node fails and two minutes before its
# time limit. It saves when it is asked to end, and resumes from its last checkpoint
# (--config.log.checkpoint_steps=N saves every N steps). A user error (exit code 2), a lack of
# memory or scancel ends it.
#
# Grids of many small runs: python -m experiments.run_grid --slurm.
#SBATCH --job-name=pgpsam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail

lost=69      # exit code of a process that lost another one
restarts=50  # after so many, something else is wrong

again() {
    if (( ${SLURM_RESTART_COUNT:-0} < restarts )); then
        echo "slurm.sh: $1; back to the queue" >&2
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    echo "slurm.sh: $1; not requeued after ${SLURM_RESTART_COUNT:-0} restarts" >&2
}
over="time is nearly over"
ending=
trap 'ending=1; kill -USR1 "$step"; (sleep 90; again "$over") & watchdog=$!' USR1

srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m pgpsam_jax.main "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do  # a signal ends a wait, not the step
    wait "$step"
done
wait "$step"
code=$?
if [[ $ending ]]; then
    kill "$watchdog"
    again "$over"
elif (( code == lost )); then
    again "a process is gone"
fi
exit "$code"
