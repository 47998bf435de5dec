#!/usr/bin/env bash
# Source this after tools/setup_environment.sh. It refuses at once what cannot start, and sets num_nodes and node_rank.
# `count_gpus` prints the number of GPUs of this node that CUDA shows. `launch_training NPROC FLAG...` trains in NPROC
# processes on this node. `fit_batch SAMPLES NPROC` prints a global batch near SAMPLES that all processes can share.
# Parallel sizes and nodes come from environment variables:
#   TP PP VP CP EP                             parallel sizes
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   for several nodes (default: from SLURM's variables)
#   MAX_RESTARTS   after failures, from the newest checkpoint (default: 100; three without a new checkpoint are the last)
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

# Before any arithmetic, in which bash runs the command of a value such as "a[$(command)]".
for name in NPROC MAX_RESTARTS SLURM_STEP_NUM_NODES SLURM_STEP_NUM_TASKS SLURM_JOB_ID; do
    [[ "${!name:-0}" =~ ^(0|[1-9][0-9]{0,9})$ ]] || fail "$name: must be a whole number, got ${!name}. Correct or unset it."
done
# Inside `srun`, SLURM describes the step, which may have fewer nodes than the job.
num_nodes="${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}"
[[ "$num_nodes" =~ ^[1-9][0-9]{0,5}$ ]] || fail "NNODES: must be a whole number above 0, got $num_nodes. Correct it."
if ((${SLURM_STEP_NUM_TASKS:-1} > ${SLURM_STEP_NUM_NODES:-1})); then
    fail "srun: must start this script once on each node, got $SLURM_STEP_NUM_TASKS tasks on" \
        "$SLURM_STEP_NUM_NODES nodes. The script starts the processes of its node itself:" \
        "srun --nodes $num_nodes --ntasks-per-node 1 bash $0. To have SLURM start every process, run" \
        "srun python -m megatron_hammer.training.pretrain instead."
fi
if ((num_nodes > 1)) && [[ -z "${NODE_RANK:-}" ]]; then
    if [[ -n "${SLURM_JOB_ID:-}" && -z "${SLURM_STEP_NUM_NODES:-}" ]]; then
        fail "SLURM: every node of the job must run this script, got one run of it for $num_nodes nodes." \
            "Start it with srun: srun --nodes $num_nodes --ntasks-per-node 1 bash $0. For one node, set NNODES=1."
    fi
    NODE_RANK="${SLURM_NODEID:-}"
    [[ -n "$NODE_RANK" ]] || fail "NODE_RANK: must be the number of this node, counted from 0, got none" \
        "for NNODES=$num_nodes. Set it on each node."
fi
node_rank="${NODE_RANK:-0}"

count_gpus() {
    "$PYTHON" -c "from megatron_hammer.scaling.hardware.visible_gpus import list_gpu_names; print(len(list_gpu_names()))"
}

fit_batch() {
    local samples="$1" num_processes=$(($2 * num_nodes))
    echo "$((samples > num_processes ? samples / num_processes * num_processes : num_processes))"
}

# Every node would write the same files of demonstration data at the same time.
refuse_demo_on_several_nodes() {
    if ((num_nodes > 1)); then
        fail "DATA_PATH: must be set for a run on several nodes, got none for $num_nodes nodes. The demonstration" \
            "runs on one node: set NNODES=1."
    fi
}

# The host of node 0, and a port of its own for each job: two jobs that share a node would need the same port.
find_master() {
    local nodes="${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}"
    master_addr="${MASTER_ADDR:-}"
    if [[ -z "$master_addr" ]]; then
        # "n[03-04,7],m1" begins with n03. scontrol would say so too, but containers often lack it.
        master_addr="$(sed -E 's/\[([^],-]+)[^]]*\]/\1/g; s/,.*//' <<<"$nodes")"
    fi
    [[ -n "$master_addr" ]] || fail "MASTER_ADDR: must be the host of node 0, got none for NNODES=$num_nodes. Set it."
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        # Below 32768, where Linux begins to give out ports itself.
        master_port="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
    else
        master_port="${MASTER_PORT:-29500}"
    fi
}

launch_training() {
    local nproc="$1" launch sizes=() master_addr master_port
    shift
    launch=(--nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-100}")
    if [[ -n "${TP:-}" ]]; then sizes+=(--tensor-model-parallel-size "$TP"); fi
    if [[ -n "${PP:-}" ]]; then sizes+=(--pipeline-model-parallel-size "$PP"); fi
    if [[ -n "${VP:-}" ]]; then sizes+=(--num-virtual-stages-per-pipeline-rank "$VP"); fi
    if [[ -n "${CP:-}" ]]; then sizes+=(--context-parallel-size "$CP"); fi
    if [[ -n "${EP:-}" ]]; then sizes+=(--expert-model-parallel-size "$EP"); fi
    if ((num_nodes > 1)); then
        find_master
        launch+=(--nnodes "$num_nodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
    else
        launch+=(--standalone)
    fi
    "$PYTHON" -m megatron_hammer.training.launch "${launch[@]}" -- "${sizes[@]}" "$@"
}
