#!/bin/bash
# Merges into the memory of a Cloud TPU pod: tpu_pod.sh TPU ZONE RECIPE
# The same command runs on every host; JAX finds out how many there are. The models may be gs:// URLs.
set -euo pipefail

TPU=$1 ZONE=$2 RECIPE=$3

gcloud compute tpus tpu-vm scp --worker=all --zone="$ZONE" merge.py "$RECIPE" "$TPU":
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="pip install --quiet 'jax[tpu]' jaxmerge && python merge.py $(basename "$RECIPE") --load"
