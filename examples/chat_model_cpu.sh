#!/usr/bin/env bash
# A chat model from nothing on two CPU cores in under ten minutes: text and conversations made on this machine, a base
# model, SFT in Megatron's loop, DPO through TRL, evaluation, answers to questions that it has never seen, and a chat.
#
#   bash examples/chat_model_cpu.sh
#
# The model has 5 million parameters and knows four things: it greets, adds small numbers, repeats words, and tells kinds
# of files apart. The script fails if it does not end its turn in nine of ten answers. Steps that are complete are kept.
# From the environment:
#   OUTPUT_DIR   everything (default: outputs/chat-model); hf/ is the chat model at the end
#   NPROC        processes of the training (default: 2)
#   PRETRAIN_STEPS SFT_EPOCHS DPO_STEPS   length of the training (defaults: 60, 2, 30)
#   MIN_STOPPED  least share of answers that must end (default: 0.9)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
SETUP_EXTRAS="post-training serving gguf" source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"

dir="${OUTPUT_DIR:-$root/outputs/chat-model}"
nproc="${NPROC:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CORPUS_BYTES="${CORPUS_BYTES:-3000000}"
mkdir -p "$dir"

pretrain() { # FLAG...
    "$PYTHON" -m megatron_hammer.training.launch --standalone --nproc-per-node "$nproc" -- \
        --preset hammer-tiny --platform cpu --eval-iters 0 --tokenizer-model "$dir/data/tokenizer.model" "$@"
}

export_model() { # CHECKPOINT HF_DIR
    if [[ ! -s "$2/config.json" ]]; then
        "$PYTHON" "$root/checkpoint_convert/megatron_to_hf.py" --load "$1" --save "$2" --verify tensors \
            --tokenizer-model "$dir/data/tokenizer.model"
    fi
}

build_demo_corpus "$dir/data"
if [[ ! -s "$dir/data/tokenizer.model" ]]; then
    echo "== tokenizer, with the control tokens of ChatML"
    printf '%s\n' '<|im_start|>' '<|im_end|>' >"$dir/data/chat_tokens.txt"
    "$PYTHON" "$root/tools/tokenizer_train.py" --input "$dir/data/corpus.jsonl" --output "$dir/data/tokenizer.model" \
        --vocab-size 4096 --user-defined-symbols-file "$dir/data/chat_tokens.txt"
fi
build_demo_data "$dir/data" 4096

echo "== base model: $dir/base"
pretrain --save "$dir/base" --train-data-path "$dir/data/train_text_document" \
    --train-iters "${PRETRAIN_STEPS:-60}" --lr-warmup-iters 10
export_model "$dir/base" "$dir/base/hf"

echo "== conversations"
if [[ ! -s "$dir/chat/held_out.jsonl" ]]; then
    "$PYTHON" "$root/tools/build_machine_conversations.py" --output-dir "$dir/chat"
fi
if [[ ! -s "$dir/chat/sft.idx" ]]; then
    "$PYTHON" "$root/tools/preprocess_conversations.py" --input "$dir/chat/conversations.jsonl" \
        --tokenizer-model "$dir/data/tokenizer.model" --chat-template chatml --output-prefix "$dir/chat/sft" \
        --max-length 256 --workers 2
fi

echo "== SFT in Megatron's loop: $dir/sft"
pretrain --sft --load-hf "$dir/base/hf" --save "$dir/sft" --train-data-path "$dir/chat/sft" \
    --sft-epochs "${SFT_EPOCHS:-2}" --lr 2e-3 --min-lr 2e-4
export_model "$dir/sft" "$dir/sft/hf"

if [[ ! -s "$dir/hf/config.json" ]]; then
    echo "== DPO through TRL: $dir/hf"
    cat >"$dir/dpo.toml" <<TOML
lr = 5e-5
lr_warmup_steps = 4
train_steps = ${DPO_STEPS:-30}
micro_batch_size = 16
global_batch_size = 16
[dpo]
beta = 0.1
sft_weight = 0.2 # keeps so small a model from forgetting the chosen answers
TOML
    "$PYTHON" "$root/tools/post_train.py" dpo --load "$dir/sft/hf" --data "$dir/chat/preferences.jsonl" \
        --config "$dir/dpo.toml" --save "$dir/hf" --platform cpu
fi

echo "== perplexity of held-out text that is no conversation: so small a model forgets it while it learns to chat"
"$PYTHON" "$root/tools/evaluate_perplexity.py" --models "base=$dir/base/hf" "chat=$dir/hf" \
    --domains "text=$dir/data/valid.jsonl" --max-documents 4 --max-characters 1000 --platform cpu
echo "== answers to held-out questions"
"$PYTHON" "$root/tools/check_chat.py" --model "$dir/hf" --questions "$dir/chat/held_out.jsonl" --max-new-tokens 48 \
    --min-stopped "${MIN_STOPPED:-0.9}" --platform cpu
echo "== a chat, through llama.cpp; yours: $PYTHON tools/chat.py --model $dir/hf"
printf '%s\n' "Hello, I am Mia." "What is 3 + 4?" |
    "$PYTHON" "$root/tools/chat.py" --model "$dir/hf" --temperature 0 --max-tokens 48
