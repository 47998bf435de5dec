#!/usr/bin/env bash
# Pretrain HammerLLM-1.4B on all GPUs of this node, or its miniature on the CPU where there is no GPU.
#
#   bash examples/pretrain_hammer_1b4.sh [any megatron_hammer or Megatron flag]
#
# From the environment:
#   DATA_PATH        prefixes of indexed data, "PREFIX" or "WEIGHT PREFIX WEIGHT PREFIX" (default: text on this machine)
#   TOKENIZER_MODEL  the SentencePiece model or Hugging Face folder that made the data
#   OUTPUT_DIR       checkpoints, logs, metrics (default: outputs/hammer-1b4 or outputs/hammer-tiny)
#   TP PP VP CP EP   parallel sizes (CPU default: TP=2)
#   NPROC            processes on this node (default: its GPUs; 2 on the CPU)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several nodes; SLURM's own variables are read where these are not set
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"

num_gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then
    num_gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
fi
arguments=()
if ((num_gpus > 0)); then
    preset=hammer-1b4
    nproc="${NPROC:-$num_gpus}"
    num_demo_pieces=16000
else
    echo "No GPU here: training hammer-tiny, a miniature of hammer-1b4, on ${NPROC:-2} CPU processes."
    preset=hammer-tiny
    nproc="${NPROC:-2}"
    num_demo_pieces=4096
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [[ -z "${PP:-}" ]]; then TP="${TP:-2}"; fi
fi
output_dir="${OUTPUT_DIR:-$root/outputs/$preset}"

if [[ -n "${DATA_PATH:-}" ]]; then
    read -r -a data_path <<<"$DATA_PATH"
    arguments+=(--data-path "${data_path[@]}")
    if [[ -n "${TOKENIZER_MODEL:-}" ]]; then arguments+=(--tokenizer-model "$TOKENIZER_MODEL"); fi
else
    build_demo_data "$output_dir/data" "$num_demo_pieces"
    TOKENIZER_MODEL="$output_dir/data/tokenizer.model"
    arguments+=(--train-data-path "$output_dir/data/train_text_document"
        --valid-data-path "$output_dir/data/valid_text_document" --tokenizer-model "$TOKENIZER_MODEL"
        --full-validation)
    if ((num_gpus > 0)); then
        echo "DATA_PATH is not set: the real model on demonstration data; its vocabulary stays HammerLLM's."
        arguments+=(--vocab-size 105789)
    fi
fi

if [[ -n "${TP:-}" ]]; then arguments+=(--tensor-model-parallel-size "$TP"); fi
if [[ -n "${PP:-}" ]]; then arguments+=(--pipeline-model-parallel-size "$PP"); fi
if [[ -n "${VP:-}" ]]; then arguments+=(--num-virtual-stages-per-pipeline-rank "$VP"); fi
if [[ -n "${CP:-}" ]]; then arguments+=(--context-parallel-size "$CP"); fi
if [[ -n "${EP:-}" ]]; then arguments+=(--expert-model-parallel-size "$EP"); fi

launch=(--nproc-per-node "$nproc")
nnodes="${NNODES:-${SLURM_NNODES:-1}}"
if ((nnodes > 1)); then
    if [[ -z "${MASTER_ADDR:-}" ]]; then
        hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
        MASTER_ADDR="${hosts%%$'\n'*}"
    fi
    launch+=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-${SLURM_NODEID:?NODE_RANK is not set}}"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    launch+=(--standalone)
fi

"$PYTHON" -m megatron_hammer.training.launch "${launch[@]}" -- \
    --preset "$preset" --save "$output_dir" "${arguments[@]}" "$@"

if ((num_gpus == 0)); then
    echo "== export to Hugging Face"
    "$PYTHON" "$root/checkpoint_convert/megatron_to_hf.py" --load "$output_dir" --save "$output_dir/hf" \
        --tokenizer-model "$TOKENIZER_MODEL" --overwrite
    echo "== a sample from the exported model, by transformers"
    "$PYTHON" "$root/tools/generate_sample.py" --model "$output_dir/hf" --prompt "${PROMPT:-def }" --max-new-tokens 60
fi
