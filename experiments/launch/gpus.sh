#!/usr/bin/env bash
# One run on the GPUs of one machine, with one process per GPU.
#
#   experiments/launch/gpus.sh 4 --config configs/synapse.py --workdir runs/synapse
#
# A single process uses all GPUs of a machine, which is usually enough:
#
#   .venv/bin/python -m pgpsam_jax.main --config configs/synapse.py --workdir runs/synapse
#
# One process per GPU can be faster if the host is the bottleneck, and rehearses a cluster on one
# machine. The first argument is the number of processes; the rest goes to pgpsam_jax.main.
# CUDA_VISIBLE_DEVICES=2,3 selects GPUs, PYTHON=/path/to/python replaces .venv/bin/python. If one
# process fails, the others and the script end too, with a nonzero code. A signal to the script
# reaches all processes, which save and exit with code 75. The same command resumes from the last
# checkpoint.
set -uo pipefail

count=${1:?"usage: gpus.sh PROCESSES --config FILE --workdir FOLDER"}
shift
python=${PYTHON:-.venv/bin/python}
port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
if (( ${#gpus[@]} < count )); then
    echo "error: $count processes but CUDA_VISIBLE_DEVICES names ${#gpus[@]} GPUs" >&2
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
    while kill -0 "$process" 2>/dev/null; do  # a signal ends a wait, not the process
        wait "$process"
    done
    wait "$process" || { ended=$?; (( code )) || code=$ended; }
done
exit "$code"
