#!/usr/bin/env bash
# Starts one run on all hosts of a Cloud TPU slice (TPU VMs) from your own machine.
#
#   TPU=my-v5e-16 ZONE=us-west4-a experiments/launch/tpu_pod.sh \
#       --config configs/synapse.py --workdir /shared/runs/synapse
#
# One-time setup:
#   gcloud compute tpus tpu-vm create my-v5e-16 --zone us-west4-a \
#       --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite
#   gcloud compute tpus tpu-vm ssh my-v5e-16 --zone us-west4-a --worker=all --command \
#       'git clone URL pgpsam_jax && cd pgpsam_jax && python3 -m venv .venv && .venv/bin/pip install -q -e .[tpu]'
# and a shared folder for --workdir (Filestore, or a bucket mounted with gcsfuse).
#
# The same command runs on every host; the hosts find each other through the slice's metadata. The
# script's arguments are passed to pgpsam_jax.main. FOLDER is the checkout on the hosts (default:
# pgpsam_jax in the home folder). After a preemption, run the same command again to resume from the
# last checkpoint. DRY_RUN=1 only prints the command.
set -euo pipefail

: "${TPU:?"set TPU to the name of the slice"}" "${ZONE:?"set ZONE to the zone of the slice"}"
printf -v arguments ' %q' "$@"
printf -v folder '%q' "${FOLDER:-pgpsam_jax}"
command="cd $folder && .venv/bin/python -m pgpsam_jax.main$arguments"
${DRY_RUN:+echo} gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "$command"
