#!/usr/bin/env bash
# Teach a base model to chat: SFT, a reward model and DPO through TRL, on all GPUs of this node or on the CPU, and the
# result as a Hugging Face folder and as a Megatron checkpoint.
#
#   HF_DIR=hf/base SFT_DATA="chat/*.jsonl" DPO_DATA=preferences.jsonl bash examples/post_train.sh [any flag of post-train]
#
# A stage that is complete is kept, and a killed one continues: run the same command again.
# From the environment:
#   HF_DIR         the base model with its tokenizer, which has the control tokens of the template (required)
#   SFT_DATA       conversations for SFT, files and globs (default: none, and HF_DIR is a chat model already)
#   DPO_DATA       preference pairs for DPO and the reward model (default: none, and only SFT runs)
#   CHAT_TEMPLATE  name of a shipped template, or a Jinja file (default: chatml for SFT; DPO takes the model's own)
#   OUTPUT_DIR     chat/ after SFT, reward/, aligned/ after DPO, megatron/ (default: outputs/post_trained)
#   SFT_CONFIG REWARD_CONFIG DPO_CONFIG   hyper-parameters (default: the files in examples/post_training/)
#   REWARD         1 trains the reward model too (default: 0; DPO needs none)
#   NPROC          processes on this node (default: its GPUs; 1 on the CPU)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
SETUP_EXTRAS=post-training source "$root/tools/setup_environment.sh"
# shellcheck source=examples/launch_training.sh
source "$root/examples/launch_training.sh"

hf_dir="${HF_DIR:?HF_DIR: must name the folder of a Hugging Face model. Set it}"
output_dir="${OUTPUT_DIR:-$root/outputs/post_trained}"
recipes="$root/examples/post_training"
if [[ -z "${SFT_DATA:-}${DPO_DATA:-}" ]]; then
    fail "SFT_DATA and DPO_DATA: one must name data, got neither. Set SFT_DATA, DPO_DATA or both."
fi
num_gpus="$(count_gpus)"
nproc="${NPROC:-$((num_gpus > 0 ? num_gpus : 1))}"

post_train() { # STAGE DATA MODEL SAVE CONFIG FLAG...
    local stage="$1" data=() model="$3" save="$4" config="$5"
    read -r -d '' -a data <<<"$2" || true
    if [[ -s "$save/config.json" ]]; then return; fi
    echo "== $stage: $save"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$nproc" "$root/tools/post_train.py" "$stage" \
        --load "$model" --data "${data[@]}" --config "$config" --save "$save" "${@:6}"
}

model="$hf_dir"
if [[ -n "${SFT_DATA:-}" ]]; then
    post_train sft "$SFT_DATA" "$model" "$output_dir/chat" "${SFT_CONFIG:-$recipes/sft.toml}" \
        --chat-template "${CHAT_TEMPLATE:-chatml}" "$@"
    model="$output_dir/chat"
fi
if [[ -n "${DPO_DATA:-}" ]]; then
    if [[ "${REWARD:-0}" == 1 ]]; then
        post_train reward "$DPO_DATA" "$model" "$output_dir/reward" "${REWARD_CONFIG:-$recipes/reward.toml}" "$@"
    fi
    post_train dpo "$DPO_DATA" "$model" "$output_dir/aligned" "${DPO_CONFIG:-$recipes/dpo.toml}" "$@"
    model="$output_dir/aligned"
fi
echo "== back to a Megatron checkpoint: $output_dir/megatron"
"$PYTHON" "$root/checkpoint_convert/hf_to_megatron.py" --load "$model" --save "$output_dir/megatron" --overwrite
