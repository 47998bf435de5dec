"""Whether model and layout fit together: every divisibility, and every layer in exactly one stage."""

import math

from megatron_hammer.config.flags import Flags, flag_of, show_value
from megatron_hammer.config.model_arguments import YARN_ARGUMENTS
from megatron_hammer.config.run_plan import Machine, RunSettings
from megatron_hammer.model.accounting import ParallelLayout, find_shard_problems, find_split_problems, split_layers
from megatron_hammer.model.layout import divisors, or_list
from megatron_hammer.model.shape import ModelShape, YarnScaling
from megatron_hammer.platforms.device import count_devices


def find_device_problems(machine: Machine) -> list[str]:
    """Each process of a node needs a GPU of its own; one without would end with CUDA's "invalid device ordinal"."""
    if machine.platform != "cuda" or machine.is_planned:
        return []
    num_devices = count_devices()
    if machine.local_world_size <= num_devices:
        return []
    return [
        f"nproc-per-node: must be at most the GPUs that PyTorch sees, got {machine.local_world_size} processes on a "
        f"node with {num_devices}. Lower it, or look at CUDA_VISIBLE_DEVICES, which may hide GPUs."
    ]


def find_run_layout_problems(settings: RunSettings) -> list[str]:
    """`find_layout_problems` of a command line; needs a model to look at."""
    if settings.model is None or settings.layout is None:
        return []
    problems = find_layout_problems(
        settings.model,
        settings.layout,
        world_size=settings.machine.world_size,
        layers_per_chunk=settings.layers_per_chunk,
        seq_length=settings.seq_length,
    )
    instances = settings.flags["num_distributed_optimizer_instances"]
    return (problems or _find_instance_problems(settings.model, settings.layout, instances)) + _find_window_problems(
        settings.flags
    )


def _find_window_problems(flags: Flags) -> list[str]:
    """Windows that megatron's two attentions would read in different ways, and patterns that fit no model."""
    window, frequency, num_layers = flags["window_size"], flags["window_attn_skip_freq"], flags["num_layers"]
    if window is None:
        return []
    problems = []
    if len(window) != 2 or window[0] < 0 or window[1] != 0:
        problems.append(
            "window-size: must be how many tokens before a position it sees, and 0 for those after it, got "
            f"window_size={','.join(map(str, window))}. Pass --window-size 4095,0 for a window of 4,096 tokens."
        )
    pattern = frequency if isinstance(frequency, list) else [1]
    if (isinstance(frequency, int) and frequency < 2) or not any(pattern) or not set(pattern) <= {0, 1}:
        problems.append(
            "window-attn-skip-freq: must leave layers with a window, got "
            f"window_attn_skip_freq={show_value(frequency)}. Pass N for a layer without one after "
            "N - 1 with one, a list with 1 for a window and 0 for none, or drop it for a window everywhere."
        )
    elif isinstance(frequency, list) and len(frequency) != num_layers:
        problems.append(
            f"window-attn-skip-freq: must have one number for each of {num_layers} layers, got {len(frequency)}. "
            "Lengthen or shorten the list."
        )
    kinds = set(flags["cp_comm_type"]) - {"a2a", "all_gather"}
    if flags["context_parallel_size"] > 1 and kinds and flags["backend"] == "te":
        problems.append(
            "window-size: with context parallelism TransformerEngine exchanges keys by a2a or all_gather alone, got "
            f"cp_comm_type={', '.join(sorted(kinds))}. Pass --cp-comm-type a2a."
        )
    return problems


def _find_instance_problems(model: ModelShape, layout: ParallelLayout, instances: int) -> list[str]:
    """Several instances of the distributed optimizer divide the ranks of the same weights, or experts, evenly."""
    kinds = {"weights": layout.dense_shard_size}
    if model.moe is not None:
        kinds["experts"] = layout.expert_data_parallel_size
    return [
        f"num-distributed-optimizer-instances: must divide the {ranks} ranks that hold the same {kind}, got "
        f"num_distributed_optimizer_instances={instances}. Use {or_list(divisors(math.gcd(*kinds.values())))}."
        for kind, ranks in kinds.items()
        if ranks % instances
    ]


def find_layout_problems(
    model: ModelShape,
    layout: ParallelLayout,
    *,
    world_size: int,
    layers_per_chunk: int | None = None,
    seq_length: int | None = None,
) -> list[str]:
    """Problems of the ranks, the pipeline and the cuts.

    layers_per_chunk: of --num-layers-per-virtual-pipeline-stage, where that flag decides the number of chunks.
    """
    problems = find_world_problems(layout, world_size) + _find_chunk_problems(model, layout, layers_per_chunk)
    # Wrong ranks or chunks make every further number wrong, so the checks below would only repeat this problem.
    if problems:
        return problems
    problems += find_shard_problems(model, layout)
    problems += find_split_problems(model.num_layers, layout)
    problems += _find_head_problems(model)
    problems += _find_sequence_problems(model, layout, seq_length)
    if not problems:
        problems += _find_lost_layers(model, layout)
    if model.moe is not None and model.moe.router_topk > model.moe.num_experts:
        problems.append(
            f"moe-router-topk: must be at most num_experts, got moe_router_topk={model.moe.router_topk}, "
            f"num_experts={model.moe.num_experts}. Pass a smaller --moe-router-topk."
        )
    return problems


def find_world_problems(layout: ParallelLayout, world_size: int) -> list[str]:
    """The ranks that are started must be whole copies of the model."""
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    ranks = tp * pp * cp
    if world_size % ranks == 0:
        return []
    # With fewer ranks than one copy needs, the only smaller multiple is 0.
    fewer = f"{world_size // ranks * ranks} or " if world_size >= ranks else ""
    more = (world_size // ranks + 1) * ranks
    return [
        f"world-size: must be a multiple of tensor x pipeline x context parallel sizes, got world_size={world_size}, "
        f"tp={tp}, pp={pp}, cp={cp} ({ranks} ranks per copy of the model). Start {fewer}{more} processes, or change "
        "the sizes."
    ]


def _find_chunk_problems(model: ModelShape, layout: ParallelLayout, layers_per_chunk: int | None) -> list[str]:
    if layers_per_chunk is None:
        return []
    # megatron.training.arguments.validate_args asserts the same: a number of layers per chunk needs equal stages.
    if layout.num_layers_first_stage or layout.num_layers_last_stage:
        return [
            "num-layers-per-virtual-pipeline-stage: cannot be combined with uneven stages, got "
            f"num_layers_per_virtual_pipeline_stage={layers_per_chunk}. Pass --num-virtual-stages-per-pipeline-rank."
        ]
    pp = layout.pipeline_model_parallel_size
    # The embedding and the loss each take the place of a layer where the run accounts for them.
    slots = model.num_layers + int(layout.accounts_for_embedding) + int(layout.accounts_for_loss)
    if slots % pp or slots // pp % layers_per_chunk == 0:
        return []  # the split itself is reported by find_split_problems
    return [
        f"num-layers-per-virtual-pipeline-stage: must divide the {slots // pp} layers of a stage, got "
        f"num_layers_per_virtual_pipeline_stage={layers_per_chunk}. Use {or_list(divisors(slots // pp))}."
    ]


def _find_head_problems(model: ModelShape) -> list[str]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    problems = []
    if heads % groups:
        problems.append(
            f"num-query-groups: must divide num_attention_heads, got num_query_groups={groups}, "
            f"num_attention_heads={heads}. Use {or_list(divisors(heads))}."
        )
    if model.position_embedding_type == "rope" and model.head_dim % 2:
        problems.append(
            f"kv-channels: rotary embeddings turn pairs of channels, got kv_channels={model.head_dim}. "
            "Use an even number."
        )
    elif model.position_embedding_type == "rope":
        turned = model.head_dim * model.rotary_percent
        if not 0 < turned <= model.head_dim or int(turned) < 2 or int(turned) % 2:
            problems.append(
                f"rotary-percent: must be a share of kv_channels that is an even number of channels, got "
                f"rotary_percent={model.rotary_percent:g}, kv_channels={model.head_dim}. Pass 1, or 0.5."
            )
    if model.attention_scale is not None and not 0 < model.attention_scale < math.inf:
        problems.append(
            "mup-base-head-dim: must give a positive scale of the scores, sqrt(mup-base-head-dim) / kv-channels ** "
            f"mup-attn-scale-power, got {model.attention_scale:g}. Pass the width of a head of the base model."
        )
    if not 0 < model.residual_multiplier < math.inf:
        problems.append(
            f"residual-multiplier: must be a positive number, got residual_multiplier={model.residual_multiplier:g}. "
            "Pass 1, or drop it."
        )
    return problems + _find_yarn_problems(model)


def _find_yarn_problems(model: ModelShape) -> list[str]:
    """Numbers of which megatron's YaRN makes infinite or undefined frequencies."""
    scaling = model.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return []
    fast, slow, is_finite = scaling.beta_fast, scaling.beta_slow, math.isfinite(scaling.attention_factor)
    wanted = {
        "factor": (scaling.factor >= 1, "at least 1"),
        "original_max_position_embeddings": (scaling.original_max_position_embeddings > 0, "positive"),
        "beta_fast": (math.inf > fast >= slow > 0, f"at least beta_slow={slow:g}, both above 0"),
        "mscale": (is_finite and scaling.attention_factor > 0, "one that makes a positive factor of sines and cosines"),
    }
    problems = [
        f"{flag_of(name)}: must be {expected} with --position-embedding-type yarn, got {name}="
        f"{getattr(scaling, field):g}. Pass the model's own number, as its config.json has it."
        for field, (is_met, expected) in wanted.items()
        for name in [YARN_ARGUMENTS[field][0]]
        if not is_met
    ]
    if model.rotary_base <= 1:
        problems.append(
            f"rotary-base: must be above 1 with --position-embedding-type yarn, which divides by its logarithm, got "
            f"rotary_base={model.rotary_base}. Pass the model's own number."
        )
    return problems


def _find_sequence_problems(model: ModelShape, layout: ParallelLayout, seq_length: int | None) -> list[str]:
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    if seq_length is None:
        return []
    problems = []
    # Each context-parallel rank takes two chunks, one from each half of the sequence, so that the causal mask gives all
    # ranks equal work (get_batch_on_this_cp_rank).
    if cp > 1 and seq_length % (2 * cp):
        problems.append(
            f"seq-length: must be a multiple of 2 x context_parallel_size, got seq_length={seq_length}, cp={cp}. "
            f"Use {next_multiple(seq_length, 2 * cp)}."
        )
    # Sequence parallelism splits the sequence of one context-parallel rank over its tensor-parallel ranks.
    elif layout.has_sequence_parallel and seq_length // cp % tp:
        problems.append(
            f"seq-length: must be a multiple of tensor x context parallel sizes with --sequence-parallel, got "
            f"seq_length={seq_length}, tp={tp}, cp={cp}. Use {next_multiple(seq_length, tp * cp)}."
        )
    # Also for rotary embeddings, which have no such table: validate_args asserts it for every model.
    if model.max_position_embeddings < seq_length:
        problems.append(
            f"max-position-embeddings: must be at least seq_length, got "
            f"max_position_embeddings={model.max_position_embeddings}, seq_length={seq_length}. "
            f"Pass --max-position-embeddings {seq_length}."
        )
    return problems


def _find_lost_layers(model: ModelShape, layout: ParallelLayout) -> list[str]:
    """Last: the layers of all chunks together are the layers of the model, each once."""
    chunks = [chunk for stage in split_layers(model.num_layers, layout) for chunk in stage]
    built = sorted(layer for chunk in chunks for layer in chunk.list_layers())
    if built == list(range(model.num_layers)):
        return []
    return [
        f"pipeline-model-parallel-size: every layer must be in one stage, got {len(set(built))} of "
        f"num_layers={model.num_layers}. Use fewer stages or chunks."
    ]


def next_multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
