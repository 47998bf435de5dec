#!/usr/bin/env bash
# Turn raw text into training data: drop duplicates, tokenize, verify, inspect, blend. Each step is a tool of its own,
# and docs/data.md explains them. Complete outputs are kept, and an unfinished step continues where it stopped.
#
#   bash examples/prepare_corpus.sh [any flag of tools/preprocess_data.py]
#
# From the environment:
#   SOURCES          NAME=PATH of each source, in one string; PATH is a file, a quoted glob or a directory
#                    (default: text found on this machine)
#   TOKENIZER_MODEL  SentencePiece model or Hugging Face folder (default: one trained here, of 4,096 pieces)
#   OUTPUT_DIR       (default: outputs/corpus)
#   JSON_KEY         field that holds the text (default: text)
#   NEAR_DUPLICATES  1 drops documents that are almost equal, 0 only equal ones (default: 1)
#   TEMPERATURE      weights of the blend ~ tokens^(1/T) (default: 1, by size)
#   SPLIT            shares of training, validation and test (default: 98,2,0)
#   TRAIN_TOKENS     length of the run to preview, such as 20B (default: 10M)
#   SEQ_LENGTH       tokens per sample (default: 2048)
#   WORKERS          encoding processes (default: one per core)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"

output_dir="${OUTPUT_DIR:-$root/outputs/corpus}"
json_key="${JSON_KEY:-text}"
split="${SPLIT:-98,2,0}"
mkdir -p "$output_dir"
if [[ -z "${SOURCES:-}" || -z "${TOKENIZER_MODEL:-}" ]]; then
    build_demo_corpus "$output_dir/machine"
fi
# The tools expand patterns themselves, so the shell must not.
set -f
read -r -d '' -a sources <<<"${SOURCES:-machine=$output_dir/machine/corpus.jsonl}" || true
if [[ -z "${TOKENIZER_MODEL:-}" ]]; then
    build_demo_tokenizer "$output_dir/machine" 4096
    TOKENIZER_MODEL="$output_dir/machine/tokenizer.model"
fi
near=(--near-duplicates)
if [[ "${NEAR_DUPLICATES:-1}" == 0 ]]; then near=(); fi
workers=()
if [[ -n "${WORKERS:-}" ]]; then workers=(--workers "$WORKERS"); fi

prefixes=()
for source in "${sources[@]}"; do
    name="${source%%=*}" path="${source#*=}"
    if [[ "$name" == "$source" || ! "$name" =~ ^[A-Za-z0-9._-]+$ ]]; then
        echo "SOURCES: must be NAME=PATH, the name of letters, digits and .-_, got $source." >&2
        exit 2
    fi
    if [[ ! -s "$output_dir/$name.jsonl.zst" ]]; then
        echo "== $name: duplicates"
        "$PYTHON" "$root/tools/dedup_data.py" --input "$path" --json-keys "$json_key" "${near[@]}" \
            --output "$output_dir/$name.jsonl.zst" --report "$output_dir/$name.duplicates.jsonl"
    fi
    echo "== $name: tokens"
    "$PYTHON" "$root/tools/preprocess_data.py" --input "$output_dir/$name.jsonl.zst" --json-keys "$json_key" \
        --tokenizer-model "$TOKENIZER_MODEL" --output-prefix "$output_dir/$name" --append-eod "${workers[@]}" "$@"
    prefix="$output_dir/${name}_${json_key}_document"
    prefixes+=("$name=$prefix")
    echo "== $name: what the pair holds"
    "$PYTHON" "$root/tools/inspect_data.py" "$prefix" --verify --tokenizer-model "$TOKENIZER_MODEL" --top 10 \
        --samples 2 --plot "$output_dir/$name.lengths.png"
done

echo "== blend"
"$PYTHON" "$root/tools/blend_data.py" "${prefixes[@]}" --temperature "${TEMPERATURE:-1}" --split "$split" \
    --train-tokens "${TRAIN_TOKENS:-10M}" --seq-length "${SEQ_LENGTH:-2048}" --output "$output_dir/blend.txt"
echo "Train on it with: --data-args-path $output_dir/blend.txt --split $split --tokenizer-model $TOKENIZER_MODEL"
