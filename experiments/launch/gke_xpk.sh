#!/usr/bin/env bash
# Submits a sweep to a GKE cluster through xpk: one workload per cell, which the cluster queues.
#
#   CLUSTER=NAME TPU_TYPE=v5litepod-16 IMAGE=IMAGE STORAGE=NAME \
#     experiments/launch/gke_xpk.sh --config CONFIG --workdir /mounted/DIR
#
# README.md says what the image and the cluster need. Run again, it submits the unfinished cells.
# Delete workloads that still run first.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CLUSTER:?is the name of the cluster}" "${TPU_TYPE:?is its type of slice}"
: "${IMAGE:?has this repository in its working directory}" "${STORAGE:?is mounted for --workdir}"
PYTHON=${PYTHON:-.venv/bin/python} # here
PREFIX=${PREFIX:-dit}              # of the names of workloads

number=0
"$PYTHON" -m experiments.scaling.sweep --executor print "$@" | while read -r command; do
  xpk workload create --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --num-slices=1 \
    --docker-image="$IMAGE" --storage="$STORAGE" --max-restarts=10 \
    --workload="$PREFIX-$number" --command="$command --distributed" </dev/null
  number=$((number + 1))
done
