#!/usr/bin/env bash
# Convert a Megatron checkpoint to a Hugging Face model: inspect it, export it, and let it continue a text.
#
#   bash examples/convert_to_hf.sh [any flag of checkpoint_convert/megatron_to_hf.py]
#
# From the environment:
#   CHECKPOINT       directory that training saved into, or one iteration of it (default: outputs/hammer-1b4 or
#                    outputs/hammer-tiny, where examples/pretrain_hammer_1b4.sh saves; if neither exists, a few steps of
#                    hammer-tiny are trained on text found on this machine)
#   OUTPUT_DIR       the Hugging Face folder (default: outputs/convert-to-hf/hf); an earlier export there is replaced
#   TOKENIZER_MODEL  SentencePiece model or Hugging Face folder (default: the one named in the checkpoint)
#   PROMPT           text to continue (default: "def ")
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"

work_dir="$root/outputs/convert-to-hf"
output_dir="${OUTPUT_DIR:-$work_dir/hf}"

find_checkpoint() {
    local candidate
    for candidate in "$root/outputs/hammer-1b4" "$root/outputs/hammer-tiny" "$work_dir/trained"; do
        if [[ -s "$candidate/latest_checkpointed_iteration.txt" ]]; then
            echo "$candidate"
            return
        fi
    done
}

# train_demo DIR: a checkpoint of two tensor-parallel ranks, so that the export has to join split tensors
train_demo() {
    echo "No checkpoint found: training 4 steps of hammer-tiny. Set CHECKPOINT to export your own."
    build_demo_data "$work_dir/data" 4096
    OMP_NUM_THREADS=1 "$PYTHON" -m megatron_hammer.training.launch --standalone --nproc-per-node 2 -- \
        --preset hammer-tiny --platform cpu --backend torch --tensor-model-parallel-size 2 --seq-length 128 \
        --train-data-path "$work_dir/data/train_text_document" \
        --valid-data-path "$work_dir/data/valid_text_document" \
        --tokenizer-model "$work_dir/data/tokenizer.model" --train-iters 4 --lr-warmup-iters 0 --eval-iters 0 \
        --save "$1"
}

checkpoint="${CHECKPOINT:-$(find_checkpoint)}"
if [[ -z "$checkpoint" ]]; then
    checkpoint="$work_dir/trained"
    train_demo "$checkpoint"
fi
tokenizer=()
if [[ -n "${TOKENIZER_MODEL:-}" ]]; then tokenizer=(--tokenizer-model "$TOKENIZER_MODEL"); fi

echo "== what $checkpoint holds"
"$PYTHON" "$root/checkpoint_convert/inspect_checkpoint.py" "$checkpoint"
echo "== export to Hugging Face"
mkdir -p "$(dirname "$output_dir")"
"$PYTHON" "$root/checkpoint_convert/megatron_to_hf.py" --load "$checkpoint" --save "$output_dir" --overwrite \
    "${tokenizer[@]}" "$@"
if [[ -s "$output_dir/tokenizer.json" ]]; then
    echo "== a sample from the exported model, by transformers"
    "$PYTHON" "$root/tools/generate_sample.py" --model "$output_dir" --prompt "${PROMPT:-def }" --max-new-tokens 40
fi
