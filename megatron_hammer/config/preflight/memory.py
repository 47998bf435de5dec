"""Estimated memory of each pipeline stage against what a device holds."""

import argparse
import math
import os

from megatron_hammer.config.environment import read_process_place
from megatron_hammer.config.model_arguments import read_model
from megatron_hammer.config.model_from_arguments import build_layout
from megatron_hammer.config.samples import select_global_batch_size
from megatron_hammer.model.accounting import MemoryOptions, ParallelLayout, StageMemory, estimate_memory
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.memory_options import WORKSPACE_BYTES, Recompute, Sharding
from megatron_hammer.platforms.device import read_device_memory_bytes


def estimate_run_memory(namespace: argparse.Namespace) -> tuple[StageMemory, ...]:
    """The peak of each stage; needs a namespace whose layout and batch fit.

    A run on this machine's CPU has no CUDA context and no caching allocator; a planned one is planned for GPUs.
    """
    layout = build_layout(namespace)
    ranks_of_step = namespace.micro_batch_size * layout.data_parallel_size
    is_for_gpu = namespace.platform == "cuda" or namespace.gpu_memory_gib is not None or is_planned(namespace)
    gpu_allowances = {} if is_for_gpu else {"context_bytes": 0, "fragmentation_ratio": 0.0}
    return estimate_memory(
        read_model(namespace),
        layout,
        micro_batch_size=namespace.micro_batch_size,
        seq_length=namespace.seq_length,
        num_microbatches=max(1, select_global_batch_size(namespace) // ranks_of_step),
        options=build_memory_options(namespace, layout, is_for_gpu=is_for_gpu),
        **gpu_allowances,  # type: ignore[arg-type]
    )


def build_memory_options(namespace: argparse.Namespace, layout: ParallelLayout, *, is_for_gpu: bool) -> MemoryOptions:
    """The flags of a run that change its memory; Megatron's spelling of each is in `MemoryOptions`."""
    is_16_bit = namespace.bf16 or namespace.fp16
    has_fp32_gradients = namespace.bf16 or namespace.accumulate_allreduce_grads_in_fp32 or not is_16_bit
    is_sharded = layout.has_distributed_optimizer
    instances = namespace.num_distributed_optimizer_instances
    comm_types = namespace.cp_comm_type if isinstance(namespace.cp_comm_type, list) else [namespace.cp_comm_type]
    return MemoryOptions(
        precision="bf16" if is_16_bit else "fp32",
        recompute=select_recompute(namespace),
        recompute_modules=tuple(namespace.recompute_modules or ("core_attn",)),
        recompute_method=namespace.recompute_method or "uniform",
        recompute_num_layers=namespace.recompute_num_layers,
        has_hidden_dropout=namespace.hidden_dropout > 0,
        has_attention_dropout=namespace.attention_dropout > 0,
        has_flash_attention=getattr(namespace.attention_backend, "name", "auto") not in ("unfused", "local"),
        cross_entropy=namespace.cross_entropy_fusion_impl if namespace.cross_entropy_loss_fusion else "unfused",
        is_context_parallel_all_to_all=comm_types == ["a2a"],
        sharding=_select_sharding(namespace, layout),
        shard_size=layout.dense_shard_size // instances if is_sharded and instances > 1 else None,
        gradient_bytes=4 if has_fp32_gradients and not namespace.grad_reduce_in_bf16 else 2,
        has_fused_activation=namespace.bias_swiglu_fusion,
        has_fused_weight_gradients=namespace.gradient_accumulation_fusion,
        workspace_bytes=WORKSPACE_BYTES if is_for_gpu else 0,
        vocab_divisible_by=namespace.make_vocab_size_divisible_by,
    )


def _select_sharding(namespace: argparse.Namespace, layout: ParallelLayout) -> Sharding:
    """FSDP shards everything unless Megatron's is told to shard less; shards of gradients alone count as none."""
    if namespace.use_torch_fsdp2:
        return "fsdp"
    if namespace.use_megatron_fsdp:
        strategies: dict[str, Sharding] = {"optim_grads_params": "fsdp", "no_shard": "none"}
        return strategies.get(namespace.data_parallel_sharding_strategy, "distributed_optimizer")
    return "distributed_optimizer" if layout.has_distributed_optimizer else "none"


def is_planned(namespace: argparse.Namespace) -> bool:
    """Whether this is the plan of a run elsewhere: a dry run that no launcher started."""
    return namespace.dry_run and (namespace.requested_world_size is not None or "WORLD_SIZE" not in os.environ)


def select_recompute(namespace: argparse.Namespace) -> Recompute:
    if namespace.recompute_granularity == "full":
        return "full"
    return "selective" if namespace.recompute_granularity or namespace.recompute_activations else "none"


def read_available_bytes(namespace: argparse.Namespace) -> int | None:
    """What one rank may use: --gpu-memory-gib, this machine's GPU, or its share of this machine's memory.

    None for a plan on a machine without a GPU: there is nothing to compare with.
    """
    if namespace.gpu_memory_gib is not None and math.isfinite(namespace.gpu_memory_gib):
        return round(namespace.gpu_memory_gib * GIB)
    if namespace.platform == "cpu" and is_planned(namespace):
        return None
    total = read_device_memory_bytes(namespace.platform)
    if total is None or namespace.platform != "cpu":
        return total
    return total // read_process_place().local_world_size


def find_memory_problems(namespace: argparse.Namespace) -> list[str]:
    """One problem for the stage that needs most, if it does not fit; needs a layout that holds the model."""
    available = read_available_bytes(namespace)
    if available is None or None in (namespace.micro_batch_size, namespace.seq_length):
        return []
    largest = max(estimate_run_memory(namespace), key=lambda stage: stage.total_bytes)
    if largest.total_bytes <= available:
        return []
    parts = {
        "weights": largest.weights_bytes,
        "gradients": largest.gradients_bytes,
        "optimizer": largest.optimizer_bytes,
        "buffers": largest.buffers_bytes,
        "activations": largest.activations_bytes,
        "logits": largest.logits_bytes,
        "transient": largest.transient_bytes,
    }
    heaviest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    return [
        f"memory: the estimate of pipeline stage {largest.pp_rank} must fit in a device, got "
        f"{largest.total_bytes / GIB:.1f} GiB of {available / GIB:.1f} ({heaviest}). {_advise(namespace, parts)}."
    ]


def _advise(namespace: argparse.Namespace, parts: dict[str, int]) -> str:
    """The cheapest remedy against what weighs most."""
    state = parts["weights"] + parts["gradients"] + parts["optimizer"]
    if parts["activations"] + parts["logits"] + parts["transient"] > state:
        if namespace.micro_batch_size > 1:
            return f"Pass --micro-batch-size {max(1, namespace.micro_batch_size // 2)}"
        if namespace.recompute_granularity != "full":
            return "Pass --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    return "Raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or use more devices"
