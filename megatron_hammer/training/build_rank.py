"""One rank of a cluster of any size, built alone on this CPU, and counted.

Megatron's fake process group plays all other ranks; parameters are torch's fake tensors, so 70B takes no memory.
The modules, the rank's coordinates and its optimizer shard are Megatron's own; they are compared with the arithmetic
that preflight and the scaling study use. Platform and backend change no parameter: the torch backend stands for both.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout, count_optimizer_shard, count_rank_parameters, split_layers

if TYPE_CHECKING:
    from megatron_hammer.config.arguments import ParsedArguments
    from megatron_hammer.config.run_plan import RunPlan


class DisagreementError(RuntimeError):
    """What was built is not what was counted: a bug of this package, not of the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltRank:
    """A rank as Megatron built it. layers: of each virtual chunk, numbered from 0 through the whole model."""

    preset: str | None
    world_size: int
    rank: int
    tp_rank: int
    tp: int
    cp_rank: int
    cp: int
    dp_rank: int
    dp: int
    pp_rank: int
    pp: int
    ep_rank: int
    ep: int
    expert_tp_rank: int
    expert_dp_rank: int
    layers: tuple[tuple[int, ...], ...]
    has_embedding: bool
    has_head: bool
    dense_parameters: int
    expert_parameters: int
    optimizer_parameters: int  # whose fp32 copy and moments this very rank keeps
    optimizer_padding: int  # of Megatron's buffers, in this rank's shard at most
    optimizer_share: int  # the same by preflight: an equal share, rounded up

    @property
    def num_parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"num_parameters": self.num_parameters}


def build_rank(argv: Sequence[str], rank: int) -> BuiltRank:
    """Build rank `rank` of the run that `argv` (training's command line, with --world-size) describes.

    Raises ConfigError for an impossible rank or layout, DisagreementError if the built rank differs from the counted
    one.
    """
    from megatron_hammer.platforms import megatron_compat

    megatron_compat.install("cpu")

    from megatron_hammer.config.megatron_checks import build_trial_config, build_trial_ddp_config
    from megatron_hammer.model.provider import build_model_config

    arguments, plan = read_rank_plan(argv)
    plan.layout.coordinates(rank)  # a rank outside the world is refused here
    # The batch places no parameter, and a recipe's may not divide over a world that was chosen freely.
    batch = plan.batch.micro_batch_size * plan.layout.data_parallel_size
    trial, megatron_config = build_trial_config(
        arguments.namespace, global_batch_size=batch, eval_global_batch_size=None, eval_micro_batch_size=None
    )
    config = build_model_config(
        megatron_config,
        backend="torch",
        has_embedding_norm=plan.model.has_embedding_norm,
        residual_multiplier=plan.model.residual_multiplier,
    )
    # No values, and none fetched from the first stage for a tied head. Context parallelism cuts no parameter, and the
    # torch backend has none: the groups below are the run's, the modules are built without it.
    config.transformer.perform_initialization = False
    config.transformer.init_model_with_meta_device = True
    config.transformer.context_parallel_size = 1
    config.transformer.gradient_accumulation_fusion = False  # needs a GPU's extension, and there is no backward pass
    with play_rank(plan.layout, rank) as groups:
        chunks = _build_chunks(config, groups)
        built = _describe(plan, build_trial_ddp_config(trial), rank, groups, chunks)
    compare(plan, built)
    return built


def read_rank_plan(argv: Sequence[str]) -> "tuple[ParsedArguments, RunPlan]":
    """Training's command line, planned for GPUs; raises ConfigError with every problem of model and layout."""
    from megatron_hammer.config.arguments import parse_arguments
    from megatron_hammer.config.preflight.flags import find_uncounted_problems
    from megatron_hammer.config.preflight.layout import find_run_layout_problems
    from megatron_hammer.config.values import find_missing_problems, find_value_problems
    from megatron_hammer.training.pretrain import read_named_model

    arguments = parse_arguments(argv, platform="cuda", backend="torch", initial_model=read_named_model(argv))
    flags = arguments.settings.flags
    problems = find_missing_problems(flags) + find_value_problems(flags) + find_uncounted_problems(flags)
    problems = problems or find_run_layout_problems(arguments.settings)
    if problems:
        raise ConfigError(*problems)
    return arguments, arguments.require_plan()


@contextmanager
def play_rank(layout: ParallelLayout, rank: int) -> Iterator[Any]:
    """Megatron's process groups as `rank` sees them; there are no other processes, and no message is sent."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    chunks = layout.virtual_pipeline_model_parallel_size
    torch.distributed.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            # A gloo group would wait for the other processes, and here there are none.
            create_gloo_process_groups=False,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _build_chunks(config: Any, groups: Any) -> list[Any]:
    """The rank's model chunks, of fake tensors: shapes and types without memory."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from megatron_hammer.model.provider import HammerModelBuilder

    builder = HammerModelBuilder(config)
    vp = config.transformer.virtual_pipeline_model_parallel_size
    with FakeTensorMode():
        chunks = [builder.build_model(groups, vp_stage=stage) for stage in (range(vp) if vp else [None])]
    real = [name for chunk in chunks for name, weight in chunk.named_parameters() if not isinstance(weight, FakeTensor)]
    if real:
        raise DisagreementError(f"parameters must take no memory, got real ones: {real[:3]}")
    return chunks


def _describe(plan: "RunPlan", ddp_config: Any, rank: int, groups: Any, chunks: list[Any]) -> BuiltRank:
    parameters = [item for chunk in chunks for item in chunk.named_parameters()]
    # Megatron names the routed experts of a layer mlp.experts; the shared expert (shared_experts) is dense.
    expert = sum(parameter.numel() for name, parameter in parameters if ".experts." in name)
    share = count_optimizer_shard(plan.model, plan.layout, groups.pp.rank(), vocab_divisible_by=plan.vocab_divisible_by)
    owned, padding = _count_optimizer_parameters(plan.layout, ddp_config, groups, chunks)
    return BuiltRank(
        preset=None if plan.preset is None else plan.preset.name,
        world_size=plan.machine.world_size,
        rank=rank,
        tp_rank=groups.tp.rank(),
        tp=groups.tp.size(),
        cp_rank=groups.cp.rank(),
        cp=groups.cp.size(),
        dp_rank=groups.dp.rank(),
        dp=groups.dp.size(),
        pp_rank=groups.pp.rank(),
        pp=groups.pp.size(),
        ep_rank=groups.ep.rank(),
        ep=groups.ep.size(),
        expert_tp_rank=groups.expt_tp.rank(),
        expert_dp_rank=groups.expt_dp.rank(),
        layers=tuple(tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in chunks),
        has_embedding=any(chunk.pre_process for chunk in chunks),
        has_head=any(chunk.post_process for chunk in chunks),
        dense_parameters=sum(parameter.numel() for _, parameter in parameters) - expert,
        expert_parameters=expert,
        optimizer_parameters=owned,
        optimizer_padding=padding,
        optimizer_share=share.total,
    )


def _count_optimizer_parameters(
    parallel: ParallelLayout, ddp_config: Any, groups: Any, chunks: list[Any]
) -> tuple[int, int]:
    """(elements whose optimizer state this rank keeps, its part of padding), by Megatron's layout of its buffers."""
    if not parallel.has_distributed_optimizer:
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()), 0
    owned = padding = 0
    for stage, chunk in enumerate(chunks):
        for key, layout in _lay_out_buffers(ddp_config, groups, chunk, is_first=stage == 0).items():
            # Experts have fewer copies: expert parallelism takes its ranks from the data-parallel ones.
            group = groups.expt_dp if key.is_expert_parallel else groups.dp_cp
            for start, end, bucket in layout.param_index_map.values():
                bucket_start, bucket_end = layout.bucket_indices[bucket]
                shard_size = (bucket_end - bucket_start) // group.size()
                shard_start = bucket_start + group.rank() * shard_size
                # A shard is an equal slice of a bucket and may begin or end inside a parameter.
                owned += max(0, min(end, shard_start + shard_size) - max(start, shard_start))
            used = sum(end - start for start, end, _ in layout.param_index_map.values())
            padding += -(-(sum(end - start for start, end in layout.bucket_indices) - used) // group.size())
    return owned, padding


def _lay_out_buffers(config: Any, groups: Any, chunk: Any, *, is_first: bool) -> dict[Any, Any]:
    """As megatron.core's DistributedDataParallel lays out a chunk: buckets only where gradients overlap, see there."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    has_buckets = config.overlap_grad_reduce and is_first and groups.pp.rank() == 0
    # The same default as in megatron.core.distributed.DistributedDataParallel, in elements.
    bucket_size = config.bucket_size or max(40_000_000, 1_000_000 * groups.dp.size())
    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad],
        bucket_size if has_buckets else None,
        groups.dp_cp.size(),
        config,
        expert_data_parallel_world_size=groups.expt_dp.size(),
    ).layouts


def compare(plan: "RunPlan", built: BuiltRank) -> None:
    """Raise DisagreementError with every difference between the built rank and the arithmetic."""
    model, layout = plan.model, plan.layout
    place = layout.coordinates(built.rank)
    ranges = split_layers(model.num_layers, layout)[place.pp_rank]
    local = count_rank_parameters(model, layout, place.pp_rank, vocab_divisible_by=plan.vocab_divisible_by)
    counted = place._asdict() | {
        "layers": tuple(tuple(chunk.list_layers()) for chunk in ranges),
        "dense_parameters": local.dense,
        "expert_parameters": local.expert,
    }
    differences = [
        f"{name}: counted {value}, built {getattr(built, name)}"
        for name, value in counted.items()
        if getattr(built, name) != value
    ]
    # Padding moves the ends of the shards: a rank may keep up to its part of it more than the equal share, or less.
    if built.optimizer_parameters > built.optimizer_share + built.optimizer_padding:
        differences.append(
            f"optimizer_parameters: counted {built.optimizer_share} with up to {built.optimizer_padding} of padding, "
            f"built {built.optimizer_parameters}"
        )
    if differences:
        raise DisagreementError(f"rank {built.rank} of {built.world_size}: {'; '.join(differences)}")


def print_built_rank(built: BuiltRank) -> None:
    """A few lines for people, on stdout."""
    chunks = " | ".join(f"{layers[0]}-{layers[-1]}" if layers else "none" for layers in built.layers)
    ends = [name for name, is_there in (("embedding", built.has_embedding), ("head", built.has_head)) if is_there]
    print(f"rank {built.rank:,} of {built.world_size:,}, model {built.preset or 'custom'}")
    print(
        f"  coordinates: tp {built.tp_rank} of {built.tp}, cp {built.cp_rank} of {built.cp}, "
        f"dp {built.dp_rank} of {built.dp}, pp {built.pp_rank} of {built.pp}, ep {built.ep_rank} of {built.ep}"
    )
    print(f"  layers by virtual chunk: {chunks}" + (f", with {' and '.join(ends)}" if ends else ""))
    print(
        f"  parameters: {built.num_parameters:,} (dense {built.dense_parameters:,}, "
        f"experts {built.expert_parameters:,})"
    )
    print(f"  optimizer shard: {built.optimizer_parameters:,} (an equal share: {built.optimizer_share:,})")
    print("  agrees with preflight's arithmetic")
