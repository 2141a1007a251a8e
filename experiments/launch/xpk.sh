#!/usr/bin/env bash
# Starts one run on TPU slices of a GKE cluster as an XPK workload (pip install xpk).
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/pgpsam_jax:TAG \
#       experiments/launch/xpk.sh --config configs/synapse.py --workdir /shared/runs/synapse
#
# One-time setup: the cluster (xpk cluster create), an image whose working folder is a checkout with
# pip install -e .[tpu] already run, and a shared folder for --workdir (xpk storage attach, with
# auto-mount). JAX discovers the other pods through Kubernetes.
#
# The script's arguments are passed to pgpsam_jax.main. WORKLOAD is the name of the workload
# (default: pgpsam-<user>), SLICES the number of slices (default: 1); PROJECT and ZONE locate the
# cluster. A preempted slice restarts with the same command up to RESTARTS times (default: 20) and
# resumes from the last checkpoint. DRY_RUN=1 only prints the command.
set -euo pipefail

: "${CLUSTER:?"set CLUSTER to the name of the cluster"}" "${TPU_TYPE:?"set TPU_TYPE, for example v5litepod-16"}"
: "${IMAGE:?"set IMAGE to a container image with pgpsam_jax"}"
printf -v arguments ' %q' "$@"
${DRY_RUN:+echo} xpk workload create \
    --cluster "$CLUSTER" ${PROJECT:+--project "$PROJECT"} ${ZONE:+--zone "$ZONE"} \
    --workload "${WORKLOAD:-pgpsam-${USER:-run}}" --docker-image "$IMAGE" \
    --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" --max-restarts "${RESTARTS:-20}" \
    --command "python -m pgpsam_jax.main$arguments"
