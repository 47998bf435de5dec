#!/usr/bin/env bash
# Continue the pretraining of a Hugging Face model, on all GPUs of this node or on the CPU, and export the result.
#
#   HF_DIR=models/Qwen2.5-0.5B DATA_PATH=data/corpus_text_document bash examples/continue_from_hf.sh [any flag]
#
# The first step has the loss that transformers computes for that model. After an interrupt, or with more TRAIN_STEPS,
# the same command continues from its own newest checkpoint.
# From the environment:
#   HF_DIR           the model, with its tokenizer (default: the export of examples/pretrain_hammer_1b4.sh; if that has
#                    not run, a miniature that is pretrained first)
#   PRETRAIN_STEPS   steps of that miniature (default: 30)
#   DATA_PATH        prefixes of data indexed with the model's tokenizer, "PREFIX" or "WEIGHT PREFIX WEIGHT PREFIX"
#                    (default: text on this machine)
#   OUTPUT_DIR       checkpoints, logs, metrics, and the export in hf/ (default: outputs/continued)
#   SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR WARMUP_STEPS TRAIN_STEPS   the recipe
#   PRESET           take the recipe of this preset instead; it must have the same architecture
#   TP PP VP CP EP   parallel sizes
#   NPROC            processes on this node (default: its GPUs; 2 on the CPU)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   for several nodes (default: from SLURM's variables)
#   MAX_RESTARTS     after failures, from the newest checkpoint (default: 100; three without a new one are the last)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"
# shellcheck source=examples/launch_training.sh
source "$root/examples/launch_training.sh"

num_gpus="$(count_gpus)"
if ((num_gpus > 0)); then
    nproc="${NPROC:-$num_gpus}"
    seq_length=2048 global_batch_size=256 train_steps=1000 warmup_steps=100
    if [[ -z "${DATA_PATH:-}" ]]; then
        # 1.6 million tokens, about once through the demonstration text
        seq_length=1024 global_batch_size="$(fit_batch 32 "$nproc")" train_steps=48 warmup_steps=5
    fi
else
    nproc="${NPROC:-2}"
    seq_length=256 global_batch_size=8 train_steps=30 warmup_steps=3
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
output_dir="${OUTPUT_DIR:-$root/outputs/continued}"

pretrain_miniature() { # DIR: leaves a Hugging Face folder in DIR/hf
    local dir="$1"
    if [[ -s "$dir/hf/config.json" ]]; then return; fi
    build_demo_data "$dir/data" 4096
    echo "== pretrain hammer-tiny, because there is no model to continue yet"
    "$PYTHON" -m megatron_hammer.training.pretrain --preset hammer-tiny --platform cpu --save "$dir" \
        --train-data-path "$dir/data/train_text_document" --tokenizer-model "$dir/data/tokenizer.model" \
        --eval-iters 0 --train-iters "${PRETRAIN_STEPS:-30}" --lr-warmup-iters 5
    echo "== export it"
    "$PYTHON" "$root/checkpoint_convert/megatron_to_hf.py" --load "$dir" --save "$dir/hf" \
        --tokenizer-model "$dir/data/tokenizer.model" --overwrite
}

hf_dir="${HF_DIR:-}"
if [[ -z "$hf_dir" || -z "${DATA_PATH:-}" ]]; then refuse_demo_on_several_nodes; fi
if [[ -z "$hf_dir" ]]; then seq_length=256; fi # as the miniature was trained
if [[ -z "$hf_dir" && -s "$root/outputs/hammer-tiny/hf/config.json" ]]; then
    hf_dir="$root/outputs/hammer-tiny/hf"
    echo "HF_DIR is not set: continuing $hf_dir, which examples/pretrain_hammer_1b4.sh exported."
elif [[ -z "$hf_dir" ]]; then
    echo "HF_DIR is not set: continuing a miniature, pretrained here for a few steps."
    pretrain_miniature "$output_dir/miniature"
    hf_dir="$output_dir/miniature/hf"
fi

arguments=()
if ((num_gpus > 0)); then arguments+=(--platform cuda); fi # a torch without CUDA must not train on the CPU
if [[ -n "${DATA_PATH:-}" ]]; then
    read -r -d '' -a data_path <<<"$DATA_PATH" || true
    arguments+=(--data-path "${data_path[@]}")
else
    echo "DATA_PATH is not set: continuing on demonstration text, encoded with the model's tokenizer."
    build_demo_corpus "$output_dir/data"
    for part in corpus:train valid:valid; do
        if [[ ! -s "$output_dir/data/${part#*:}_text_document.idx" ]]; then
            echo "== indexed data: ${part#*:}"
            "$PYTHON" "$root/tools/preprocess_data.py" --input "$output_dir/data/${part%%:*}.jsonl" --append-eod \
                --tokenizer-model "$hf_dir" --output-prefix "$output_dir/data/${part#*:}" --workers 2
        fi
    done
    arguments+=(--train-data-path "$output_dir/data/train_text_document"
        --valid-data-path "$output_dir/data/valid_text_document")
    # A whole pass needs a sample for each GPU, and the held-out text has only a few.
    if ((num_gpus > 0)); then arguments+=(--eval-iters 1); else arguments+=(--full-validation); fi
fi
if [[ -n "${PRESET:-}" ]]; then
    arguments+=(--preset "$PRESET")
else
    arguments+=(--seq-length "${SEQ_LENGTH:-$seq_length}" --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
        --global-batch-size "${GLOBAL_BATCH_SIZE:-$global_batch_size}" --train-iters "${TRAIN_STEPS:-$train_steps}"
        --lr "${LR:-1e-4}" --min-lr "${MIN_LR:-1e-5}" --lr-warmup-iters "${WARMUP_STEPS:-$warmup_steps}"
        --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95)
fi
launch_training "$nproc" --load-hf "$hf_dir" --save "$output_dir" "${arguments[@]}" "$@"

if ((node_rank == 0)); then
    echo "== export to Hugging Face"
    "$PYTHON" "$root/checkpoint_convert/megatron_to_hf.py" --load "$output_dir" --save "$output_dir/hf" \
        --tokenizer-model "$hf_dir" --overwrite
fi
