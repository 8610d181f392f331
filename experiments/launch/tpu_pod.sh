#!/usr/bin/env bash
# Runs a sweep on a Cloud TPU slice: its cells one after another, each in one process on every host.
#
#   TPU=NAME ZONE=ZONE experiments/launch/tpu_pod.sh --config CONFIG --workdir /shared/DIR
#
# README.md says what the hosts need. Run again, it continues: finished cells end at once.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TPU:?is the name of the slice}" "${ZONE:?is its zone}"
PYTHON=${PYTHON:-.venv/bin/python} # here
ROOT=${ROOT:-dit_jax}              # this repository on the hosts, below the home directory

"$PYTHON" -m experiments.scaling.sweep --executor print "$@" | while read -r command; do
  # A failed cell is recorded in its directory, and the others run. Without </dev/null, ssh would
  # read their commands.
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd $ROOT && PATH=\$PWD/.venv/bin:\$PATH $command --distributed" </dev/null || true
done
