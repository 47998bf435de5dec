#!/usr/bin/env bash
# Source this after tools/setup_environment.sh. `build_demo_data DIR VOCAB_SIZE` makes a corpus of text found on this
# machine (Python's own library and documentation; nothing is downloaded), a tokenizer, and indexed data. Files that
# exist are kept.
#   DIR/corpus.jsonl   DIR/valid.jsonl   DIR/tokenizer.model
#   DIR/train_text_document.{bin,idx}   DIR/valid_text_document.{bin,idx}
set -euo pipefail
demo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

build_demo_corpus() {
    local dir="$1"
    mkdir -p "$dir"
    if [[ -s "$dir/corpus.jsonl" && -s "$dir/valid.jsonl" ]]; then return; fi
    echo "== corpus from text on this machine"
    "$PYTHON" "$demo_root/tools/build_machine_corpus.py" --output "$dir/corpus.jsonl" \
        --valid-output "$dir/valid.jsonl" --max-bytes "${CORPUS_BYTES:-8000000}"
}

build_demo_tokenizer() {
    local dir="$1" vocab_size="$2"
    if [[ -s "$dir/tokenizer.model" ]]; then return; fi
    echo "== tokenizer"
    "$PYTHON" "$demo_root/tools/tokenizer_train.py" --input "$dir/corpus.jsonl" --output "$dir/tokenizer.model" \
        --vocab-size "$vocab_size" --max-bytes 4000000
}

build_demo_data() {
    local dir="$1" vocab_size="$2" part
    build_demo_corpus "$dir"
    build_demo_tokenizer "$dir" "$vocab_size"
    for part in corpus:train valid:valid; do
        if [[ ! -s "$dir/${part#*:}_text_document.idx" ]]; then
            echo "== indexed data: ${part#*:}"
            "$PYTHON" "$demo_root/tools/preprocess_data.py" --input "$dir/${part%%:*}.jsonl" --append-eod \
                --tokenizer-model "$dir/tokenizer.model" --output-prefix "$dir/${part#*:}" --workers 2
        fi
    done
}
