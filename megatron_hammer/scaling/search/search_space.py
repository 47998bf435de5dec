"""Every layout of a model on a number of GPUs that would start: the candidates of the search.

The rules are those of preflight, from the same functions of model/, so a layout listed here passes `--dry-run`. Two
rules are narrower than Megatron's on purpose: tensor parallelism always uses sequence parallelism, and Megatron-FSDP
has no pipeline stages (each micro-batch would gather every weight again). Of the uneven splits, only one per pipeline
size is tried: see _list_splits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_hammer.model.accounting import (
    ParallelLayout,
    find_grid_problems,
    find_shard_problems,
    find_split_problems,
)
from megatron_hammer.model.layout import divisors
from megatron_hammer.model.memory.options import EXPERT_OFFLOAD_MODULES, OffloadModule, RecomputeModule
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.plan import FUSED_DISPATCHERS, Cluster, Dispatcher, Plan, Precision, Recompute, Sharding

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")  # from the fastest to the smallest
# Chunks of a stage, unless more are asked for. Published runs have at most 14; with dozens of chunks of one layer, the
# times of single layers and of their exchanges decide, which nobody has measured.
MOST_CHUNKS = 16
SHARDINGS: tuple[Sharding, ...] = ("none", "distributed_optimizer", "fsdp")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """The sizes that the search may use. None: every size that fits."""

    tensor_model_parallel_sizes: tuple[int, ...] | None = None
    pipeline_model_parallel_sizes: tuple[int, ...] | None = None
    virtual_pipeline_model_parallel_sizes: tuple[int, ...] | None = None
    context_parallel_sizes: tuple[int, ...] | None = None
    expert_model_parallel_sizes: tuple[int, ...] | None = None
    expert_tensor_parallel_sizes: tuple[int, ...] | None = None
    micro_batch_sizes: tuple[int, ...] | None = None
    recomputes: tuple[Recompute, ...] = RECOMPUTES
    shardings: tuple[Sharding, ...] = SHARDINGS
    overlaps_tensor_parallel: bool | None = None  # None: wherever it is possible
    # Of every layout: what it keeps on the host. The search chooses none of these by itself.
    num_offloaded_layers: int = 0
    offload_modules: tuple[OffloadModule, ...] = ()
    optimizer_offload_ratio: float = 0.0
    overlaps_experts: bool | None = None  # likewise the exchange of tokens with experts
    dispatchers: tuple[Dispatcher, ...] | None = None  # of experts, all installed; None: the study's own only


# Restrictions that are sizes, by their flags.
SIZE_FLAGS = {
    "tensor_model_parallel_sizes": "tensor-model-parallel-size",
    "pipeline_model_parallel_sizes": "pipeline-model-parallel-size",
    "virtual_pipeline_model_parallel_sizes": "virtual-pipeline-model-parallel-size",
    "context_parallel_sizes": "context-parallel-size",
    "expert_model_parallel_sizes": "expert-model-parallel-size",
    "expert_tensor_parallel_sizes": "expert-tensor-parallel-size",
    "micro_batch_sizes": "micro-batch-size",
}


class Recomputation(NamedTuple):
    """What a plan recomputes; modules: of "selective"."""

    granularity: Recompute
    modules: tuple[RecomputeModule, ...] = ("core_attn",)


class Grid(NamedTuple):
    """Parallel sizes of the dense ranks; their product is the number of GPUs."""

    tp: int
    cp: int
    pp: int
    dp: int


def describe_restrictions(space: SearchSpace) -> str:
    """What was asked for of layouts, as flags: it may be what no layout can fulfil."""
    lists = {flag: getattr(space, name) for name, flag in SIZE_FLAGS.items()}
    lists["sharding"] = None if space.shardings == SHARDINGS else space.shardings
    given = [f"--{flag} {','.join(map(str, values))}" for flag, values in lists.items() if values is not None]
    return f" with {' '.join(given)}" if given else ""


def is_cpu_host(cluster: Cluster) -> bool:
    """Whether the ranks are CPU processes. They have no TransformerEngine, so no CP, FSDP, fp8 or overlap of TP."""
    return cluster.full_speed_processes_per_node is not None


def list_layouts(
    model: ModelShape,
    cluster: Cluster,
    *,
    num_gpus: int,
    global_batch_size: int,
    seq_length: int,
    space: SearchSpace,
) -> Iterator[ParallelLayout]:
    """Every layout of the space that can hold the model, in a fixed order; sharding and micro-batch are still open."""
    for grid in _list_grids(model, cluster, num_gpus, global_batch_size, seq_length, space):
        for layout in _list_splits(model.num_layers, _dense_layout(grid), space):
            yield from _list_expert_layouts(model, layout, space)


def list_recomputations(
    model: ModelShape, precision: Precision, cluster: Cluster, space: SearchSpace
) -> list[Recomputation]:
    """From the fastest to the one that needs the least memory.

    "selective" starts with what frees much for little: norms, activation functions of experts, projections of latent
    states, shared experts and the MLP of few dense layers. Then the whole mixture, or the MLP of a dense model, is
    repeated too. The core attention is not: flash attention keeps nothing that this would free. moe_act needs grouped
    products, which only GPUs have; neither it nor layernorm goes with delayed scaling, the recipe of fp8. Source:
    megatron.core TransformerConfig.__post_init__.
    """
    selections: list[tuple[RecomputeModule, ...]] = [("core_attn",)] if is_cpu_host(cluster) else []
    if not selections:
        has_experts, is_delayed = model.moe is not None, precision == "fp8"
        is_usable: dict[RecomputeModule, bool] = {
            "layernorm": not is_delayed,
            "mla_up_proj": model.latent_attention is not None,
            "mlp": model.is_mixed,  # of the dense layers
            "moe_act": has_experts and not is_delayed,
            "shared_experts": model.moe is not None and model.moe.shared_expert_intermediate_size > 0,
        }
        cheap = tuple(module for module, is_one in is_usable.items() if is_one)
        # A whole mixture includes its activation function and its shared expert.
        kept = tuple(module for module in cheap if module not in ("moe_act", "shared_experts"))
        whole: RecomputeModule = "moe" if has_experts else "mlp"
        selections = [selection for selection in (cheap, (*kept, whole)) if selection]
        if any(module in EXPERT_OFFLOAD_MODULES for module in space.offload_modules):
            # Megatron refuses to offload from within a mixture that is repeated as a whole.
            selections = [selection for selection in selections if "moe" not in selection]
    options = {
        "none": [Recomputation("none")],
        "selective": [Recomputation("selective", selection) for selection in selections],
        "full": [Recomputation("full")],
    }
    # Full recomputation keeps nothing that offloaded modules would move.
    allowed = [name for name in space.recomputes if name != "full" or not space.offload_modules]
    return [option for name in RECOMPUTES if name in allowed for option in options[name]]


def list_micro_batch_sizes(layout: ParallelLayout, global_batch_size: int, space: SearchSpace) -> list[int]:
    """The micro-batch sizes that divide the batch and that the schedule supports, from the smallest.

    An interleaved schedule needs a number of micro-batches that is a multiple of the number of stages.
    """
    per_rank = global_batch_size // layout.data_parallel_size
    sizes = [size for size in divisors(per_rank) if _is_allowed(size, space.micro_batch_sizes)]
    if layout.virtual_pipeline_model_parallel_size == 1:
        return sizes
    # forward_backward_pipelining_with_interleaving of megatron.core works in groups of pp micro-batches (the default of
    # microbatch_group_size_per_vp_stage), and refuses a smaller last group.
    return [size for size in sizes if per_rank // size % layout.pipeline_model_parallel_size == 0]


def list_shardings(layout: ParallelLayout, cluster: Cluster, space: SearchSpace) -> list[Sharding]:
    """The ways to shard that are worth trying. "none" only if nothing else is allowed: search.py says why.

    If a rank has no other rank to shard with, the distributed optimizer and "none" are the same.
    """
    is_alone = layout.dense_shard_size == 1 and layout.expert_data_parallel_size == 1
    has_fsdp = layout.pipeline_model_parallel_size == 1 and not is_alone and not is_cpu_host(cluster)
    shardings: list[Sharding] = ["distributed_optimizer"] if "distributed_optimizer" in space.shardings else []
    if has_fsdp and "fsdp" in space.shardings:
        shardings.append("fsdp")
    return shardings if shardings or "none" not in space.shardings else ["none"]


def list_shard_sizes(layout: ParallelLayout, sharding: Sharding, cluster: Cluster) -> list[int | None]:
    """Ranks that share one copy of what is sharded: all (None), those of an NVLink domain, or those under a leaf.

    Fewer ranks gather over faster links and shorter rings. Each holds more of the state, and the gradients are summed
    over the copies. Megatron's --num-distributed-optimizer-instances; with FSDP that is hybrid sharding.
    """
    ranks = layout.dense_shard_size
    sizes = set()
    if sharding != "none" and not is_cpu_host(cluster):
        for num_gpus in (cluster.nvlink_domain_size, cluster.leaf_size):
            size = math.gcd(num_gpus // layout.tensor_model_parallel_size, ranks)
            # megatron.core.parallel_state splits the ranks that hold the same experts into as many instances.
            if 1 < size < ranks and layout.expert_data_parallel_size % (ranks // size) == 0:
                sizes.add(size)
    return [None, *sorted(sizes)]


def has_quantized_parameters(precision: Precision, sharding: Sharding, space: SearchSpace) -> bool:
    """As NVIDIA's recipes do where Megatron can: no 16-bit weights beside the 8-bit ones.

    An optimizer on the host makes parameters of fp8 with delayed scaling only (validate_args of megatron.training).
    """
    formats = ("fp8",) if space.optimizer_offload_ratio else ("fp8", "mxfp8")
    return precision in formats and sharding != "none"


def can_overlap_tensor_parallel(layout: ParallelLayout, cluster: Cluster) -> bool:
    """Whether --tp-comm-overlap works: its user buffers need sequence parallelism inside one NVLink domain."""
    tp = layout.tensor_model_parallel_size
    # megatron.training.arguments.validate_args refuses the flag without sequence parallelism.
    return layout.has_sequence_parallel and tp <= cluster.nvlink_domain_size and not is_cpu_host(cluster)


def list_dispatchers(layout: ParallelLayout, named: tuple[Dispatcher, ...]) -> tuple[Dispatcher, ...]:
    """Those of the named ones that the layout can use.

    Where every rank has all experts whole, no token travels: DeepEP refuses to start, and alltoall only permutes.
    Source: MoEFlexTokenDispatcher of megatron.core.
    """
    if layout.expert_model_parallel_size * layout.expert_tp > 1:
        return named
    return tuple(name for name in named if name not in FUSED_DISPATCHERS) or ("alltoall",)


def can_overlap_experts(plan: Plan) -> bool:
    """Whether --overlap-moe-expert-parallel-comm works, which lets two micro-batches pass a stage at once.

    Source: megatron.core TransformerConfig and the schedules that combine a forward with a backward pass: pipelines
    must be interleaved, and nothing but parts of a layer may be recomputed.
    """
    layout = plan.layout
    is_interleaved = layout.pipeline_model_parallel_size == 1 or layout.virtual_pipeline_model_parallel_size > 1
    is_recomputed = plan.recompute == "full" or (plan.recompute == "selective" and "moe" in plan.recompute_modules)
    return (
        layout.expert_model_parallel_size > 1
        and plan.experts.dispatcher != "allgather"
        and plan.precision != "fp32"
        and plan.sharding != "fsdp"
        and is_interleaved
        and not is_recomputed
        and not is_cpu_host(plan.cluster)
    )


def _is_allowed(size: int, allowed: tuple[int, ...] | None) -> bool:
    return allowed is None or size in allowed


def _list_grids(
    model: ModelShape, cluster: Cluster, num_gpus: int, global_batch_size: int, seq_length: int, space: SearchSpace
) -> Iterator[Grid]:
    for tp in divisors(num_gpus):
        alone = ParallelLayout(
            tensor_model_parallel_size=tp, has_sequence_parallel=tp > 1, expert_tensor_parallel_size=1
        )
        if not _is_allowed(tp, space.tensor_model_parallel_sizes) or find_shard_problems(model, alone):
            continue
        for cp in divisors(num_gpus // tp):
            if not _is_allowed(cp, space.context_parallel_sizes) or not _divides_sequence(seq_length, tp, cp):
                continue
            if cp > 1 and is_cpu_host(cluster):
                continue
            for pp in divisors(num_gpus // tp // cp):
                dp = num_gpus // tp // cp // pp
                is_allowed = pp <= model.num_layers and _is_allowed(pp, space.pipeline_model_parallel_sizes)
                if is_allowed and global_batch_size % dp == 0:
                    yield Grid(tp, cp, pp, dp)


def _divides_sequence(seq_length: int, tp: int, cp: int) -> bool:
    """Two pieces per context rank (causal load balance); with sequence parallelism, each in tp pieces."""
    return seq_length % (tp * cp * (2 if cp > 1 else 1)) == 0


def _dense_layout(grid: Grid) -> ParallelLayout:
    return ParallelLayout(
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        context_parallel_size=grid.cp,
        data_parallel_size=grid.dp,
        has_sequence_parallel=grid.tp > 1,
    )


def _list_splits(num_layers: int, layout: ParallelLayout, space: SearchSpace) -> Iterator[ParallelLayout]:
    """The layout with every exact split of the layers and every number of virtual chunks.

    Besides the even split: the embedding and the head each take the place of a layer, or the head alone does. Both
    leave time for the head's work. If none of these is exact, the first and the last stage share what the middle stages
    leave, as evenly as possible.
    """
    if layout.pipeline_model_parallel_size == 1:
        if _is_allowed(1, space.virtual_pipeline_model_parallel_sizes):
            yield layout
        return
    splits = [layout, replace(layout, accounts_for_loss=True)]
    if layout.pipeline_model_parallel_size > 2:  # with two stages this is the even split again
        splits.insert(1, replace(layout, accounts_for_embedding=True, accounts_for_loss=True))
    splits = [split for split in splits if not find_split_problems(num_layers, split)]
    for split in splits or _list_uneven_splits(num_layers, layout):
        # Embedding and loss count as two layers at most, so a stage has at most one chunk more than layers.
        most = num_layers // layout.pipeline_model_parallel_size + 1
        if space.virtual_pipeline_model_parallel_sizes is None:
            most = min(most, MOST_CHUNKS)
        for vp in range(1, most + 1):
            if _is_allowed(vp, space.virtual_pipeline_model_parallel_sizes):
                chunked = replace(split, virtual_pipeline_model_parallel_size=vp)
                if not find_split_problems(num_layers, chunked):
                    yield chunked


def _list_uneven_splits(num_layers: int, layout: ParallelLayout) -> list[ParallelLayout]:
    """The last stage gets the smaller half of the rest, because it has the head. Empty if a stage would be empty."""
    pp = layout.pipeline_model_parallel_size
    middle = -(-num_layers // pp)  # rounded up: the middle stages have as many layers as the largest even share
    left = num_layers - middle * (pp - 2)
    if left < 2:
        return []
    split = replace(layout, num_layers_first_stage=left - left // 2, num_layers_last_stage=left // 2)
    return [] if find_split_problems(num_layers, split) else [split]


def _list_expert_layouts(model: ModelShape, layout: ParallelLayout, space: SearchSpace) -> Iterator[ParallelLayout]:
    """The layout itself; with experts, one layout for each way to distribute them over the ranks of a stage."""
    if model.moe is None:
        if _is_allowed(1, space.expert_model_parallel_sizes):
            yield layout
        return
    tp = layout.tensor_model_parallel_size
    for ep in divisors(model.moe.num_experts):
        # tp is Megatron's default; 1 keeps every expert whole on its rank.
        for etp in sorted({1, tp}):
            if not _is_allowed(ep, space.expert_model_parallel_sizes):
                continue
            if not _is_allowed(etp, space.expert_tensor_parallel_sizes):
                continue
            dealt = replace(layout, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
            if not find_grid_problems(dealt) and not find_shard_problems(model, dealt):
                yield dealt
