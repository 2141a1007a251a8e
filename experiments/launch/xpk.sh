#!/usr/bin/env bash
# One run over TPU slices of a GKE cluster, as an XPK workload (pip install xpk).
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/pgpsam_jax:TAG \
#       experiments/launch/xpk.sh --config configs/synapse.py --workdir /shared/runs/synapse
#
# Before, once: the cluster (xpk cluster create), an image in whose working folder
# pip install -e .[tpu] was done in a checkout, and a folder that all pods share for --workdir
# (xpk storage attach, with auto-mount). Kubernetes tells the pods of each other; JAX asks it.
#
# What follows the script's name goes to pgpsam_jax.main. WORKLOAD names the workload (default
# pgpsam-<user>), SLICES the number of slices (default 1), PROJECT and ZONE those of the cluster.
# A preempted slice is started again up to RESTARTS times (default 20), with the same command, and
# goes on from the last checkpoint. DRY_RUN=1 prints what would be called.
set -euo pipefail

: "${CLUSTER:?"CLUSTER=name of the cluster"}" "${TPU_TYPE:?"TPU_TYPE=v5litepod-16 or another"}"
: "${IMAGE:?"IMAGE=container image with pgpsam_jax"}"
printf -v arguments ' %q' "$@"
${DRY_RUN:+echo} xpk workload create \
    --cluster "$CLUSTER" ${PROJECT:+--project "$PROJECT"} ${ZONE:+--zone "$ZONE"} \
    --workload "${WORKLOAD:-pgpsam-${USER:-run}}" --docker-image "$IMAGE" \
    --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" --max-restarts "${RESTARTS:-20}" \
    --command "python -m pgpsam_jax.main$arguments"
