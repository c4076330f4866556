#!/usr/bin/env bash
# DeepSeek-V3's own layout (report section 3.2: pipeline of 16, experts over 8 nodes, ZeRO-1) on 256 nodes of 8 GPUs.
#   sbatch experiments/launch/slurm.sh
# One process a node: JAX finds the coordinator and the process's number in SLURM's variables.
#SBATCH --job-name=dsv3
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail

RUN_DIR=${RUN_DIR:?a directory that all nodes see, for checkpoints and metrics}
DATA=${DATA:?a folder of text, JSONL or parquet files that all nodes see}
TOKENIZER=${TOKENIZER:?a tokenizer.json}

# A requeued job goes on from its last checkpoint.
srun .venv/bin/python -m dsv3_jax train --preset v3-671b --run-dir "$RUN_DIR" --auto-resume \
  --processes.coordinator auto \
  --data.source "$DATA" --data.tokenizer "$TOKENIZER" \
  --mesh.stage 16 --mesh.data 2 --mesh.node 8 --mesh.expert 8 \
  --runtime.sharding pp_ep_dp --runtime.dispatch all_to_all \
  --schedule.initial-batch-size 15360 --microbatches 120 --sample-tokens 0
