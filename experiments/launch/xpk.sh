#!/usr/bin/env bash
# One run on TPU slices of a GKE cluster, as an XPK workload (pip install xpk).
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/pgpsam_jax:TAG \
#       experiments/launch/xpk.sh --config configs/synapse.py --workdir /shared/runs/synapse
#
# Before, once: the cluster (xpk cluster create), an image in whose working folder
# pip install -e .[tpu] was run in a checkout, and a shared folder for --workdir (xpk storage
# attach, with auto-mount). JAX learns of the other pods from Kubernetes.
#
# The script's arguments go to pgpsam_jax.main. WORKLOAD names the workload (default
# pgpsam-<user>), SLICES the number of slices (default 1), PROJECT and ZONE those of the cluster.
# A preempted slice restarts with the same command up to RESTARTS times (default 20) and resumes
# from the last checkpoint. DRY_RUN=1 prints the command only.
set -euo pipefail

: "${CLUSTER:?"CLUSTER=name of the cluster"}" "${TPU_TYPE:?"TPU_TYPE=v5litepod-16 or another"}"
: "${IMAGE:?"IMAGE=container image with pgpsam_jax"}"
printf -v arguments ' %q' "$@"
${DRY_RUN:+echo} xpk workload create \
    --cluster "$CLUSTER" ${PROJECT:+--project "$PROJECT"} ${ZONE:+--zone "$ZONE"} \
    --workload "${WORKLOAD:-pgpsam-${USER:-run}}" --docker-image "$IMAGE" \
    --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" --max-restarts "${RESTARTS:-20}" \
    --command "python -m pgpsam_jax.main$arguments"
