#!/usr/bin/env bash
# Pretrain HammerLLM-1.4B on all GPUs of this node, or a miniature of it on the CPU if there is no GPU. Without DATA_PATH
# it is a demonstration on text of this machine: some minutes, whether of the 1.4B model or of the miniature.
#
#   bash examples/pretrain_hammer_1b4.sh [any megatron_hammer or Megatron flag]
#   srun --nodes 2 --ntasks-per-node 1 bash examples/pretrain_hammer_1b4.sh    # several nodes, in a job of SLURM
#
# From the environment:
#   DATA_PATH        prefixes of indexed data, "PREFIX" or "WEIGHT PREFIX WEIGHT PREFIX" (default: text on this machine)
#   TOKENIZER_MODEL  SentencePiece model or Hugging Face folder with which the data was encoded
#   OUTPUT_DIR       checkpoints, logs, metrics (default: outputs/ and the preset: hammer-1b4, hammer-1b4-demo or
#                    hammer-tiny)
#   TP PP VP CP EP   parallel sizes (CPU default: TP=2)
#   NPROC            processes on this node (default: its GPUs; 2 on the CPU)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   for several nodes (default: from SLURM's variables)
#   KEEP_LAST KEEP_EVERY   checkpoints that stay: the newest (default: 3), and those at multiples of so many steps
#                    (default: 50000: 23 of the 1.4B model's 1,000 checkpoints of 20 GB); KEEP_LAST= keeps all
#   MAX_RESTARTS     after failures, from the newest checkpoint (default: 100; three without a new one are the last)
#   PROMPT           text that the exported miniature continues (default: "def ")
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"
# shellcheck source=examples/launch_training.sh
source "$root/examples/launch_training.sh"

num_gpus="$(count_gpus)"
arguments=()
if ((num_gpus > 0)); then
    preset=hammer-1b4
    if [[ -z "${DATA_PATH:-}" ]]; then preset=hammer-1b4-demo; fi
    nproc="${NPROC:-$num_gpus}"
    num_demo_pieces=16000
    arguments+=(--platform cuda) # otherwise a torch without CUDA would train this model on the CPU
else
    echo "No GPU found: training hammer-tiny, a miniature of hammer-1b4, on ${NPROC:-2} CPU processes."
    preset=hammer-tiny
    nproc="${NPROC:-2}"
    num_demo_pieces=4096
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [[ -z "${PP:-}" ]]; then TP="${TP:-2}"; fi
fi
output_dir="${OUTPUT_DIR:-$root/outputs/$preset}"
if [[ -n "${KEEP_LAST-3}" ]]; then
    arguments+=(--keep-last "${KEEP_LAST-3}" --keep-every "${KEEP_EVERY:-50000}")
fi

if [[ -n "${DATA_PATH:-}" ]]; then
    read -r -d '' -a data_path <<<"$DATA_PATH" || true
    arguments+=(--data-path "${data_path[@]}")
    if [[ -n "${TOKENIZER_MODEL:-}" ]]; then arguments+=(--tokenizer-model "$TOKENIZER_MODEL"); fi
else
    refuse_demo_on_several_nodes
    build_demo_data "$output_dir/data" "$num_demo_pieces"
    TOKENIZER_MODEL="$output_dir/data/tokenizer.model"
    arguments+=(--train-data-path "$output_dir/data/train_text_document"
        --valid-data-path "$output_dir/data/valid_text_document" --tokenizer-model "$TOKENIZER_MODEL")
    if ((num_gpus == 0)); then
        arguments+=(--full-validation)
    else
        echo "DATA_PATH is not set: a demonstration. The 1.4B model trains for 48 steps of 65,536 tokens on text of this" \
            "machine, once or twice through it: some minutes on one GPU. It then writes a checkpoint of about 20 GB to" \
            "$output_dir. The vocabulary stays HammerLLM's, larger than the tokenizer's. Any flag changes this."
        arguments+=(--vocab-size 105789 --global-batch-size "$(fit_batch 32 "$nproc")"
            --eval-iters 1) # a whole pass needs a sample for each GPU, and the held-out text has only a few
    fi
fi

launch_training "$nproc" --preset "$preset" --save "$output_dir" "${arguments[@]}" "$@"

if ((num_gpus == 0 && node_rank == 0)); then
    echo "== export to Hugging Face"
    "$PYTHON" "$root/checkpoint_convert/megatron_to_hf.py" --load "$output_dir" --save "$output_dir/hf" \
        --tokenizer-model "$TOKENIZER_MODEL" --overwrite
    echo "== a sample from the exported model, by transformers"
    "$PYTHON" "$root/tools/generate_sample.py" --model "$output_dir/hf" --prompt "${PROMPT:-def }" --max-new-tokens 60
fi
