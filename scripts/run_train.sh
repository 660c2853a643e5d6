#!/usr/bin/env bash
# Trains on this machine: CONFIG_FILE=train_configs/llama3_8b.toml NGPU=8 scripts/run_train.sh --training.steps 100
# CONFIG_FILE is the TOML (default: the debug model), NGPU the number of ranks (default: the GPUs
# present, 2 where there is none). Arguments go to train.py after the TOML's values.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus_present=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
ranks=${NGPU:-$((gpus_present > 0 ? gpus_present : 2))}
config=${CONFIG_FILE:-train_configs/debug_model.toml}

exec torchrun --nproc_per_node="$ranks" train.py --job.config_file "$config" "$@"
