#!/usr/bin/env bash
# Make a tokenizer from raw text: train it, extend a base tokenizer with it if one is given, compare, export to
# Hugging Face.
#
#   bash examples/build_tokenizer.sh [any flag of tools/tokenizer_train.py]
#
# From the environment:
#   INPUT                 files, quoted globs or directories, in one string (default: text found on this machine)
#   OUTPUT_DIR            (default: outputs/tokenizer)
#   JSON_KEY              field that holds the text (default: text)
#   VOCAB_SIZE            pieces to train (default: 4096)
#   MAX_BYTES             train on a random sample of this many bytes (default: 20000000)
#   REQUIRED_CHARS_FILE   file of characters that must be pieces
#   USER_DEFINED_SYMBOLS_FILE   file of symbols that must be pieces, one per line
#   BASE_MODEL            a SentencePiece BPE model to extend with pieces of the trained one
#   MERGE_MODE            characters (HammerLLM's way) or vocabulary (tiny-llm-zh's); default: vocabulary
#   CHARSET               file of characters whose coverage is measured
#   COMPARE               NAME=PATH of further tokenizers to compare with, in one string
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"

output_dir="${OUTPUT_DIR:-$root/outputs/tokenizer}"
json_key="${JSON_KEY:-text}"
mkdir -p "$output_dir"
if [[ -z "${INPUT:-}" ]]; then
    build_demo_corpus "$output_dir/machine"
    INPUT="$output_dir/machine/corpus.jsonl"
fi
# The tools expand patterns themselves, so the shell must not.
set -f
read -r -d '' -a inputs <<<"$INPUT" || true
read -r -d '' -a others <<<"${COMPARE:-}" || true
needed=()
if [[ -n "${REQUIRED_CHARS_FILE:-}" ]]; then needed+=(--required-chars-file "$REQUIRED_CHARS_FILE"); fi
if [[ -n "${USER_DEFINED_SYMBOLS_FILE:-}" ]]; then
    needed+=(--user-defined-symbols-file "$USER_DEFINED_SYMBOLS_FILE")
fi

echo "== train"
"$PYTHON" "$root/tools/tokenizer_train.py" --input "${inputs[@]}" --json-keys "$json_key" \
    --output "$output_dir/trained.model" --vocab-size "${VOCAB_SIZE:-4096}" --max-bytes "${MAX_BYTES:-20000000}" \
    "${needed[@]}" "$@"
tokenizer="$output_dir/trained.model"
compared=("trained=$tokenizer")
if [[ -n "${BASE_MODEL:-}" ]]; then
    echo "== extend $BASE_MODEL"
    tokenizer="$output_dir/merged.model"
    "$PYTHON" "$root/tools/tokenizer_merge.py" --base "$BASE_MODEL" --other "$output_dir/trained.model" \
        --mode "${MERGE_MODE:-vocabulary}" "${needed[@]}" --output "$tokenizer"
    compared=("merged=$tokenizer" "trained=$output_dir/trained.model" "base=$BASE_MODEL")
fi

echo "== compare"
coverage=()
if [[ -n "${CHARSET:-}" ]]; then coverage=(--charset "$CHARSET"); fi
"$PYTHON" "$root/tools/tokenizer_analyze.py" --tokenizers "${compared[@]}" "${others[@]}" --input "${inputs[@]}" \
    --json-keys "$json_key" "${coverage[@]}" --csv "$output_dir/comparison.csv" --plot "$output_dir/comparison.png"

echo "== export to Hugging Face"
rm -rf "$output_dir/hf"
"$PYTHON" "$root/tools/tokenizer_export.py" --tokenizer-model "$tokenizer" --input "${inputs[@]}" \
    --json-keys "$json_key" --save "$output_dir/hf"
