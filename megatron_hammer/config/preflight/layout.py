"""Whether model, layout and batch fit together: every divisibility, and every layer in exactly one stage."""

import argparse

from megatron_hammer.config.model_arguments import read_model
from megatron_hammer.config.model_from_arguments import build_layout, count_ranks_of_model
from megatron_hammer.config.samples import select_global_batch_size
from megatron_hammer.model.accounting import ParallelLayout, find_shard_problems, find_split_problems, split_layers
from megatron_hammer.model.layout import divisors, or_list
from megatron_hammer.model.shape import ModelShape


def find_layout_problems(namespace: argparse.Namespace) -> list[str]:
    """Problems of the ranks, the pipeline and the cuts; needs the essentials and positive sizes."""
    problems = _find_world_problems(namespace) + _find_chunk_flag_problems(namespace)
    if problems:
        return problems
    model, layout = read_model(namespace), build_layout(namespace)
    problems += find_shard_problems(model, layout)
    problems += find_split_problems(model.num_layers, layout)
    problems += _find_head_problems(model, rotary_percent=namespace.rotary_percent)
    problems += _find_sequence_problems(namespace, layout)
    if not problems:
        problems += _find_lost_layers(model, layout)
    if model.moe is not None and model.moe.router_topk > model.moe.num_experts:
        problems.append(
            f"moe-router-topk: must be at most num_experts, got moe_router_topk={model.moe.router_topk}, "
            f"num_experts={model.moe.num_experts}. Pass a smaller --moe-router-topk."
        )
    return problems


def _find_world_problems(namespace: argparse.Namespace) -> list[str]:
    ranks, world_size = count_ranks_of_model(namespace), namespace.world_size
    if world_size % ranks == 0:
        return []
    sizes = (
        f"tp={namespace.tensor_model_parallel_size}, pp={namespace.pipeline_model_parallel_size}, "
        f"cp={namespace.context_parallel_size}"
    )
    fewer = f"{world_size // ranks * ranks} or " if world_size >= ranks else ""
    more = (world_size // ranks + 1) * ranks
    return [
        f"world-size: must be a multiple of tensor x pipeline x context parallel sizes, got world_size={world_size}, "
        f"{sizes} ({ranks} ranks a copy of the model). Start {fewer}{more} processes, or change the sizes."
    ]


def _find_chunk_flag_problems(namespace: argparse.Namespace) -> list[str]:
    """--num-layers-per-virtual-pipeline-stage, which is turned into a number of chunks."""
    per_chunk = namespace.num_layers_per_virtual_pipeline_stage
    if per_chunk is None or namespace.num_virtual_stages_per_pipeline_rank is not None:
        return []
    if namespace.decoder_first_pipeline_num_layers or namespace.decoder_last_pipeline_num_layers:
        return [
            "num-layers-per-virtual-pipeline-stage: cannot be combined with uneven stages, got "
            f"num_layers_per_virtual_pipeline_stage={per_chunk}. Pass --num-virtual-stages-per-pipeline-rank."
        ]
    pp = namespace.pipeline_model_parallel_size
    slots = namespace.num_layers
    slots += int(namespace.account_for_embedding_in_pipeline_split) + int(namespace.account_for_loss_in_pipeline_split)
    if slots % pp or slots // pp % per_chunk == 0:
        return []  # the split itself is reported by find_split_problems
    return [
        f"num-layers-per-virtual-pipeline-stage: must divide the {slots // pp} layers of a stage, got "
        f"num_layers_per_virtual_pipeline_stage={per_chunk}. Use {or_list(divisors(slots // pp))}."
    ]


def _find_head_problems(model: ModelShape, *, rotary_percent: float) -> list[str]:
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
        turned = model.head_dim * rotary_percent
        if not 0 < turned <= model.head_dim or int(turned) < 2 or int(turned) % 2:
            problems.append(
                f"rotary-percent: must be a share of kv_channels that is an even number of channels, got "
                f"rotary_percent={rotary_percent:g}, kv_channels={model.head_dim}. Pass 1, or 0.5."
            )
    return problems


def _find_sequence_problems(namespace: argparse.Namespace, layout: ParallelLayout) -> list[str]:
    seq_length, tp, cp = namespace.seq_length, layout.tensor_model_parallel_size, layout.context_parallel_size
    if seq_length is None:
        return []
    problems = []
    if cp > 1 and seq_length % (2 * cp):
        problems.append(
            f"seq-length: must be a multiple of 2 x context_parallel_size, got seq_length={seq_length}, cp={cp}. "
            f"Use {_next_multiple(seq_length, 2 * cp)}."
        )
    elif layout.has_sequence_parallel and seq_length // cp % tp:
        problems.append(
            f"seq-length: must be a multiple of tensor x context parallel sizes with --sequence-parallel, got "
            f"seq_length={seq_length}, tp={tp}, cp={cp}. Use {_next_multiple(seq_length, tp * cp)}."
        )
    if namespace.max_position_embeddings < seq_length:
        problems.append(
            f"max-position-embeddings: must be at least seq_length, got "
            f"max_position_embeddings={namespace.max_position_embeddings}, seq_length={seq_length}. "
            f"Pass --max-position-embeddings {seq_length}."
        )
    return problems


def _find_lost_layers(model: ModelShape, layout: ParallelLayout) -> list[str]:
    """The last word: the layers of all chunks together are the layers of the model, each once."""
    chunks = [chunk for stage in split_layers(model.num_layers, layout) for chunk in stage]
    built = sorted(
        layer for chunk in chunks for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers)
    )
    if built == list(range(model.num_layers)):
        return []
    return [
        f"pipeline-model-parallel-size: every layer must be in one stage, got {len(set(built))} of "
        f"num_layers={model.num_layers}. Use fewer stages or chunks."
    ]


def _next_multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


# --- batch ----------------------------------------------------------------------------------------------------------


def find_batch_problems(namespace: argparse.Namespace) -> list[str]:
    """Batch sizes against the data-parallel ranks, and micro-batches against the interleaved schedule."""
    if namespace.micro_batch_size is None or _find_world_problems(namespace):
        return []
    layout = build_layout(namespace)
    dp, micro = layout.data_parallel_size, namespace.micro_batch_size
    batch = select_global_batch_size(namespace)
    problems = []
    scheduled = namespace.step_batch_size_schedule is not None
    if batch % (micro * dp) and not namespace.decrease_batch_size_if_needed and not scheduled:
        problems.append(_batch_problem("global_batch_size", batch, "micro_batch_size", micro, dp))
    eval_batch = namespace.eval_global_batch_size or batch
    eval_micro = namespace.eval_micro_batch_size or micro
    is_own = namespace.eval_global_batch_size is not None or namespace.eval_micro_batch_size is not None
    if namespace.train_samples is not None and namespace.train_samples < batch:
        problems.append(
            f"train-samples: must fill one step, got train_samples={namespace.train_samples}, "
            f"global_batch_size={batch}. Raise --train-samples, or lower --global-batch-size."
        )
    if eval_batch % (eval_micro * dp) and (is_own or not problems):
        problems.append(_batch_problem("eval_global_batch_size", eval_batch, "eval_micro_batch_size", eval_micro, dp))
    if problems or scheduled or layout.virtual_pipeline_model_parallel_size == 1:
        return problems
    return _find_schedule_problems("global_batch_size", batch // (micro * dp), namespace, layout) + (
        _find_schedule_problems("eval_global_batch_size", eval_batch // (eval_micro * dp), namespace, layout)
        if is_own and namespace.eval_iters
        else []
    )


def _batch_problem(name: str, batch: int, micro_name: str, micro: int, dp: int) -> str:
    flag = name.replace("_", "-")
    unit = micro * dp
    fitting = [size for size in divisors(batch // dp) if size <= micro] if batch % dp == 0 else []
    smaller = f", or --{micro_name.replace('_', '-')} {fitting[-1]}" if fitting else ""
    lower = batch // unit * unit
    nearest = f"{lower} or {lower + unit}" if lower else str(unit)
    return (
        f"{flag}: must be a multiple of {micro_name} x data-parallel size, got {name}={batch}, "
        f"{micro_name}={micro}, dp={dp}. Use --{flag} {nearest}{smaller}."
    )


def _find_schedule_problems(
    name: str, num_microbatches: int, namespace: argparse.Namespace, layout: ParallelLayout
) -> list[str]:
    """The interleaved schedule takes micro-batches in groups (megatron.core.pipeline_parallel.schedules)."""
    pp = layout.pipeline_model_parallel_size
    group = namespace.microbatch_group_size_per_vp_stage or pp
    facts = f"got {num_microbatches} micro-batches, pp={pp}, microbatch_group_size_per_vp_stage={group}"
    if not pp <= group <= num_microbatches:
        return [
            f"{name.replace('_', '-')}: the interleaved schedule needs at least as many micro-batches as stages, and a "
            f"group of micro-batches between the two, {facts}. Raise --{name.replace('_', '-')}, lower "
            "--micro-batch-size, or drop the virtual stages."
        ]
    if 0 < num_microbatches % group < pp:
        return [
            f"{name.replace('_', '-')}: the interleaved schedule takes micro-batches in groups of {group}, and a last "
            f"group must have at least one for each stage, {facts}. "
            f"Use {num_microbatches // group * group} or {_next_multiple(num_microbatches, group)} micro-batches."
        ]
    return []
