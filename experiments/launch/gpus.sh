#!/usr/bin/env bash
# Starts one run on a single machine, with one process per GPU.
#
#   experiments/launch/gpus.sh 4 --config configs/synapse.py --workdir runs/synapse
#
# Usually you do not need this script: a single process uses all GPUs of the machine.
#
#   .venv/bin/python -m pgpsam_jax.main --config configs/synapse.py --workdir runs/synapse
#
# One process per GPU can be faster when the host is the bottleneck, and lets you rehearse a cluster
# run on one machine. The first argument is the number of processes; all others are passed to
# pgpsam_jax.main. Set CUDA_VISIBLE_DEVICES=2,3 to select GPUs and PYTHON=/path/to/python to use
# another interpreter than .venv/bin/python. If one process fails, the others and the script exit
# too, with a nonzero code. Signals are forwarded to all processes, which save a checkpoint and exit
# with code 75. Run the same command again to resume from the last checkpoint.
set -uo pipefail

count=${1:?"usage: gpus.sh PROCESSES --config FILE --workdir FOLDER"}
shift
python=${PYTHON:-.venv/bin/python}
port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
if (( ${#gpus[@]} < count )); then
    echo "error: $count processes but CUDA_VISIBLE_DEVICES lists only ${#gpus[@]} GPUs" >&2
    exit 2
fi

processes=()
trap 'kill "${processes[@]}" 2>/dev/null' INT TERM USR1
for (( i = 0; i < count; i++ )); do
    CUDA_VISIBLE_DEVICES=${gpus[i]} "$python" -m pgpsam_jax.main "$@" \
        --coordinator "localhost:$port" --processes "$count" --process "$i" &
    processes+=($!)
done
code=0
for process in "${processes[@]}"; do
    while kill -0 "$process" 2>/dev/null; do  # a signal interrupts wait, not the process
        wait "$process"
    done
    wait "$process" || { ended=$?; (( code )) || code=$ended; }
done
exit "$code"
