#!/usr/bin/env bash
# A slice of 2,048 v5p chips (8x16x16): FSDP x experts x tensor, a step that the compiler says fits (docs/parallelism.md).
#   experiments/launch/tpu_pod.sh NAME ZONE
# Starts the same command on every host of the slice; JAX finds the other hosts through the TPU's metadata.
set -euo pipefail

NAME=${1:?name of the TPU slice}
ZONE=${2:?its zone}
RUN_DIR=${RUN_DIR:?a directory that all hosts see (a mounted file system), for checkpoints and metrics}
DATA=${DATA:?a folder of text, JSONL or parquet files that all hosts see}
TOKENIZER=${TOKENIZER:?a tokenizer.json that all hosts see}

gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "
  cd dsv3_jax && make setup &&
  .venv/bin/pip install --quiet 'jax[tpu]' &&
  .venv/bin/python -m dsv3_jax train --preset v3-671b --run-dir '$RUN_DIR' --auto-resume \
    --processes.coordinator auto \
    --data.source '$DATA' --data.tokenizer '$TOKENIZER' \
    --mesh.fsdp 16 --mesh.expert 64 --mesh.tensor 2 \
    --runtime.sharding fsdp_ep --runtime.dispatch ragged_all_to_all --runtime.remat block \
    --schedule.initial-batch-size 15360 --microbatches 15 --sample-tokens 0
"
