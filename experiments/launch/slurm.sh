#!/usr/bin/env bash
# Runs a training job on the GPUs of a SLURM allocation.
#
#   sbatch --nodes=2 --gpus-per-node=4 --time=08:00:00 experiments/launch/slurm.sh \
#       --config configs/synapse.py --workdir /shared/runs/synapse
#
# Submit it from the checkout, which all nodes must be able to read. The script's arguments are
# passed to pgpsam_jax.main; --workdir must be on a shared file system. Pass the partition, account
# and so on to sbatch. By default there is one task per node, which uses all of its GPUs; pass
# --ntasks-per-node=4 --gpus-per-task=1 for one task per GPU. Set PYTHON=/path/to/python to use
# another interpreter than .venv/bin/python.
#
# The job is requeued when it is preempted, when a node fails, and two minutes before its time
# limit. It saves a checkpoint before it stops and resumes from the last one
# (--config.log.checkpoint_steps=N saves every N steps). It ends for good on a user error (exit code
# 2), when it runs out of memory, and on scancel.
#
# For grids of many small runs, use python -m experiments.run_grid --slurm instead.
#SBATCH --job-name=pgpsam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -uo pipefail

lost=69      # exit code of a process whose peer is gone
restarts=50  # after that many, something else is wrong

again() {
    if (( ${SLURM_RESTART_COUNT:-0} < restarts )); then
        echo "slurm.sh: $1; requeued" >&2
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    echo "slurm.sh: $1; not requeued after ${SLURM_RESTART_COUNT:-0} restarts" >&2
}
over="the time limit is near"
ending=
trap 'ending=1; kill -USR1 "$step"; (sleep 90; again "$over") & watchdog=$!' USR1

srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m pgpsam_jax.main "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do  # a signal interrupts wait, not the step
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
