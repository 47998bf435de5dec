#!/usr/bin/env bash
# Source this after tools/setup_environment.sh. `count_gpus` prints the number of GPUs of this node. `launch_training
# NPROC FLAG...` trains in NPROC processes on this node. Parallel sizes and nodes come from environment variables:
#   TP PP VP CP EP                             parallel sizes
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   for several nodes (default: from SLURM's variables)
set -euo pipefail

count_gpus() {
    if command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

launch_training() {
    local nproc="$1" nnodes="${NNODES:-${SLURM_NNODES:-1}}" hosts master_addr="${MASTER_ADDR:-}"
    local launch=(--nproc-per-node "$nproc") sizes=()
    shift
    if [[ -n "${TP:-}" ]]; then sizes+=(--tensor-model-parallel-size "$TP"); fi
    if [[ -n "${PP:-}" ]]; then sizes+=(--pipeline-model-parallel-size "$PP"); fi
    if [[ -n "${VP:-}" ]]; then sizes+=(--num-virtual-stages-per-pipeline-rank "$VP"); fi
    if [[ -n "${CP:-}" ]]; then sizes+=(--context-parallel-size "$CP"); fi
    if [[ -n "${EP:-}" ]]; then sizes+=(--expert-model-parallel-size "$EP"); fi
    if ((nnodes > 1)); then
        if [[ -z "$master_addr" ]]; then
            hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
            master_addr="${hosts%%$'\n'*}"
        fi
        launch+=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:?NODE_RANK is not set}}"
            --master-addr "$master_addr" --master-port "${MASTER_PORT:-29500}")
    else
        launch+=(--standalone)
    fi
    "$PYTHON" -m megatron_hammer.training.launch "${launch[@]}" -- "${sizes[@]}" "$@"
}
