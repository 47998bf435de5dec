#!/usr/bin/env bash
# Train one model from one starting checkpoint on the same data under every parallel layout, on CPU processes. Prints
# the losses side by side and the difference of each layout from the single process. Fails if a difference is too
# large (tools/compare_runs.py).
#
#   bash examples/parallel_tour_cpu.sh [any megatron_hammer or Megatron flag, for every run]
#
# From the environment:
#   STEPS        training steps of each run (default: 6)
#   LAYOUTS      layouts from the list below, in one string (default: all). The first of each model must be single or
#                moe-single, with which the others are compared
#   OUTPUT_DIR   data, checkpoints, metrics and the output of each run (default: outputs/parallel-tour)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"
# shellcheck source=examples/demo_data.sh
source "$root/examples/demo_data.sh"

steps="${STEPS:-6}"
output_dir="${OUTPUT_DIR:-$root/outputs/parallel-tour}"
read -r -d '' -a layouts <<<"${LAYOUTS:-single tp2 tp2-sp pp2 pp2-vp2 dp2 tp2-pp2 moe-single moe-ep2}" || true
extra=("$@")
# One thread per process: sums keep one order, and several processes share few cores.
export OMP_NUM_THREADS=1

# train NAME PRESET NPROC FLAG...: one run, its output in OUTPUT_DIR/NAME/output.txt
train() {
    local name="$1" preset="$2" nproc="$3"
    shift 3
    mkdir -p "$output_dir/$name"
    "$PYTHON" -m megatron_hammer.training.launch --standalone --nproc-per-node "$nproc" -- --preset "$preset" \
        --platform cpu --backend torch --data-path "$output_dir/data/train_text_document" --split 100,0,0 \
        --tokenizer-model "$output_dir/data/tokenizer.model" --eval-iters 0 --lr-warmup-iters 0 \
        --metrics-path "$output_dir/$name/metrics.jsonl" "$@" "${extra[@]}" >"$output_dir/$name/output.txt" || {
        local code=$?
        echo "$name failed; its output is in $output_dir/$name/output.txt" >&2
        return "$code"
    }
}

# make_start PRESET: a checkpoint of new weights, made by one step with a learning rate of zero; once for each PRESET
declare -A has_start=()
make_start() {
    local preset="$1"
    if [[ -n "${has_start[$preset]:-}" ]]; then return; fi
    echo "== starting checkpoint of $preset"
    rm -rf "${output_dir:?}/start-$preset"
    train "start-$preset" "$preset" 1 --train-iters 1 --lr 0 --min-lr 0 --save "$output_dir/start-$preset/checkpoint"
    has_start[$preset]=1
}

# run_layout LAYOUT PRESET NPROC FLAG...: the steps of one layout from its model's starting checkpoint
run_layout() {
    local layout="$1" preset="$2" nproc="$3" started_s
    make_start "$preset"
    started_s=$SECONDS
    train "$@" --train-iters "$steps" --load "$output_dir/start-$preset/checkpoint" --finetune
    echo "== $layout: $preset on $nproc process$([[ $nproc == 1 ]] || echo es), $((SECONDS - started_s)) s"
    if [[ $preset == hammer-tiny ]]; then
        dense_runs+=("$layout=$output_dir/$layout/metrics.jsonl")
    else
        moe_runs+=("$layout=$output_dir/$layout/metrics.jsonl")
    fi
}

build_demo_data "$output_dir/data" 4096
dense_runs=()
moe_runs=()
tp2=(--tensor-model-parallel-size 2)
pp2=(--pipeline-model-parallel-size 2)
for layout in "${layouts[@]}"; do
    case "$layout" in
    single) run_layout "$layout" hammer-tiny 1 ;;
    tp2) run_layout "$layout" hammer-tiny 2 "${tp2[@]}" ;;
    tp2-sp) run_layout "$layout" hammer-tiny 2 "${tp2[@]}" --sequence-parallel ;;
    pp2) run_layout "$layout" hammer-tiny 2 "${pp2[@]}" ;;
    pp2-vp2) run_layout "$layout" hammer-tiny 2 "${pp2[@]}" --num-virtual-stages-per-pipeline-rank 2 ;;
    dp2) run_layout "$layout" hammer-tiny 2 --use-distributed-optimizer ;;
    tp2-pp2) run_layout "$layout" hammer-tiny 4 "${tp2[@]}" "${pp2[@]}" ;;
    moe-single) run_layout "$layout" hammer-tiny-moe 1 ;;
    moe-ep2) run_layout "$layout" hammer-tiny-moe 2 --expert-model-parallel-size 2 ;;
    *)
        echo "LAYOUTS: must name layouts of this script, got $layout. See the case statement in $0." >&2
        exit 2
        ;;
    esac
done

groups=()
if ((${#dense_runs[@]} > 0)); then groups+=(--runs "${dense_runs[@]}"); fi
if ((${#moe_runs[@]} > 0)); then groups+=(--runs "${moe_runs[@]}"); fi
"$PYTHON" "$root/tools/compare_runs.py" "${groups[@]}"
