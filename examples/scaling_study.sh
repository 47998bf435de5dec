#!/usr/bin/env bash
# Measure this machine and compare it with its projection, then project hammer-1b4 and Llama-3 70B on a cluster. Writes
# an HTML report of each.
#
#   bash examples/scaling_study.sh [any megatron_hammer or Megatron flag, for every measured run]
#
# The sweep times operators and runs short trainings of PRESET on 1 and 2 CPU processes. The performance model is
# calibrated on these alone. Then its predictions are compared with runs on 4 processes, which it has not seen.
#
# From the environment:
#   OUTPUT_DIR         all outputs (default: outputs/scaling-study); finished runs there are kept
#   PRESET             preset of the sweep (default: hammer-tiny)
#   LAYOUTS            layouts for the calibration (default: single,dp2,tp2,pp2)
#   HELD_OUT_LAYOUTS   layouts for the comparison (default: dp4,tp2-dp2,pp2-dp2; - for none)
#   STEPS              steps of each training (default: 15)
#   WARMUP_STEPS       first steps that are not measured (default: 3)
#   STATISTIC          of steps and operators: median, or fastest on a busy machine (default: median)
#   SAMPLES_PER_RANK   samples per step and process, so the batch grows with the processes (default: 4)
#   PROFILE_S          seconds for which each operator is timed (default: 0.2)
#   PROFILE_PROCESSES  processes that time collectives (default: 2)
#   CPU_PROCESSES      numbers of processes to project (default: 1,2,4,8)
#   STUDIES            presets to project on a cluster (default: hammer-1b4 llama3-70b; - for none)
#   STUDY_GPU          GPU of that cluster (default: h100-sxm)
#   STUDY_GPUS         numbers of GPUs (default: 8,16,32,64,128,256,512,1024,2048,4096)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$root/tools/setup_environment.sh"

output_dir="${OUTPUT_DIR:-$root/outputs/scaling-study}"
preset="${PRESET:-hammer-tiny}"
held_out_layouts="${HELD_OUT_LAYOUTS:-dp4,tp2-dp2,pp2-dp2}"
statistic="${STATISTIC:-median}"
samples_per_rank="${SAMPLES_PER_RANK:-4}"
read -r -d '' -a studies <<<"${STUDIES:-hammer-1b4 llama3-70b}" || true
# One thread per process: sums keep one order, and several processes share few cores.
export OMP_NUM_THREADS=1
machine=(--gpus-file "$output_dir/machine/gpus.toml" --clusters-file "$output_dir/machine/clusters.toml")
mkdir -p "$output_dir"

study() {
    "$PYTHON" "$root/tools/scaling_study.py" "$@"
}

# measure DIR LAYOUTS TRAINING_FLAG...: short trainings on CPU processes; finished ones are kept
measure() {
    local dir="$1" layouts="$2"
    shift 2
    study measure --platform cpu --presets "$preset" --layouts "$layouts" --samples-per-rank "$samples_per_rank" \
        --steps "${STEPS:-15}" --warmup-steps "${WARMUP_STEPS:-3}" --statistic "$statistic" --output-dir "$dir" -- "$@"
}

if [[ ! -s "$output_dir/machine/coefficients.toml" ]]; then
    echo "== operators of this machine"
    study profile --platform cpu --processes "${PROFILE_PROCESSES:-2}" --seconds-per-operator "${PROFILE_S:-0.2}" \
        --statistic "$statistic" --output-dir "$output_dir/machine"
fi

echo "== trainings of $preset on 1 and 2 processes, to calibrate on"
measure "$output_dir/sweep" "${LAYOUTS:-single,dp2,tp2,pp2}" "$@"
cp "$output_dir/sweep/runs.csv" "$output_dir/runs.csv"
echo "== calibration on these"
coefficients="$output_dir/calibrated.toml"
study calibrate --runs "$output_dir/sweep/runs.csv" --start "$output_dir/machine/coefficients.toml" "${machine[@]}" \
    --output "$coefficients"

if [[ "$held_out_layouts" != - ]]; then
    echo "== trainings that the calibration has not seen"
    measure "$output_dir/held-out" "$held_out_layouts" "$@"
    tail -n +2 "$output_dir/held-out/runs.csv" >>"$output_dir/runs.csv"
    echo "== predictions of the calibrated model for them"
    study validate --runs "$output_dir/held-out/runs.csv" --coefficients "$coefficients" "${machine[@]}" \
        --output-dir "$output_dir/validation"
fi

echo "== measured runs on the projected curve of this machine"
study project --preset "$preset" --gpu cpu-core --cluster cpu-host "${machine[@]}" --coefficients "$coefficients" \
    --gpus "${CPU_PROCESSES:-1,2,4,8}" --samples-per-gpu "$samples_per_rank" --overlay "$output_dir/runs.csv" \
    --output-dir "$output_dir/cpu"
reports=("$output_dir/cpu/report.html")

for name in "${studies[@]}"; do
    if [[ "$name" == - ]]; then continue; fi
    echo "== $name on ${STUDY_GPU:-h100-sxm}"
    study project --preset "$name" --gpu "${STUDY_GPU:-h100-sxm}" \
        --gpus "${STUDY_GPUS:-8,16,32,64,128,256,512,1024,2048,4096}" --output-dir "$output_dir/$name"
    reports+=("$output_dir/$name/report.html")
    study emit --projection "$output_dir/$name/projection.json" --launcher torchrun,slurm \
        --output-dir "$output_dir/$name/launch"
done

printf '%s\n' "== reports" "${reports[@]}"
