"""A model, a layout and a batch as flags of megatron_hammer.training.pretrain: what `measure` runs and `emit` writes.

Sizes that a preset's recipe sets are always given, so a layout means the same with every recipe. Data, schedule and
outputs are left out; `emit` adds those.
"""

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.presets.preset import Recipe
from megatron_hammer.scaling.plan import Plan, Recompute

# Flags of a run with matrix products in 8 or 4 bits; everything else is in 16 bits. TransformerEngine's recipes.
LOW_PRECISION_FLAGS = {
    "fp8": ("--precision", "bf16", "--fp8-format", "hybrid"),
    "mxfp8": ("--precision", "bf16", "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"),
    "nvfp4": ("--precision", "bf16", "--fp4-format", "e2m1"),
}
# validate_args of megatron.training refuses Megatron-FSDP with any other checkpoint format.
FSDP_FLAGS = (
    *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
    *("--ckpt-format", "fsdp_dtensor"),
)
DEFAULT_VOCAB_DIVISOR = 128


def list_model_flags(model: ModelShape) -> list[str]:
    """--preset for a shipped model, otherwise (a Hugging Face model) its architecture flag by flag."""
    preset = PRESETS.get(model.name)
    if preset is not None and preset.model == model:
        return ["--preset", model.name]
    sizes = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.ffn_hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--kv-channels": model.head_dim,
        "--vocab-size": model.vocab_size,
        "--max-position-embeddings": model.max_position_embeddings,
        "--normalization": model.normalization,
        "--norm-epsilon": f"{model.norm_epsilon:g}",
        "--init-method-std": f"{model.init_method_std:g}",
        "--position-embedding-type": model.position_embedding_type,
    }
    flags = [word for flag, size in sizes.items() for word in (flag, str(size))]
    if model.position_embedding_type == "rope":
        flags += ["--rotary-base", str(model.rotary_base)]
        flags += _list_rope_flags(model)
    if model.num_query_groups != model.num_attention_heads:
        flags += ["--group-query-attention", "--num-query-groups", str(model.num_query_groups)]
    switches = {
        "--swiglu": model.activation == "swiglu",
        # bias_gelu of megatron.core.fusions is the tanh approximation; without the fusion it is the exact GELU.
        "--no-bias-gelu-fusion": model.activation == "gelu_erf",
        "--disable-bias-linear": not model.has_linear_bias,
        # Attention of megatron.core has this bias already if all linears have one.
        "--add-qkv-bias": model.has_qkv_bias and not model.has_linear_bias,
        "--untie-embeddings-and-output-weights": not model.has_tied_embeddings,
        "--embedding-norm": model.has_embedding_norm,
        "--qk-layernorm": model.has_qk_norm,
    }
    return [*flags, *(flag for flag, is_set in switches.items() if is_set), *_list_expert_flags(model)]


def _list_rope_flags(model: ModelShape) -> list[str]:
    flags = []
    if model.rope_scaling is not None:
        flags += ["--use-rope-scaling", "--rope-scaling-factor", f"{model.rope_scaling.factor:g}"]
    if model.rotary_seq_len_interpolation_factor is not None:
        flags += ["--rotary-seq-len-interpolation-factor", str(model.rotary_seq_len_interpolation_factor)]
    return flags


def _list_expert_flags(model: ModelShape) -> list[str]:
    moe = model.moe
    if moe is None:
        return []
    flags = ["--num-experts", str(moe.num_experts), "--moe-router-topk", str(moe.router_topk)]
    flags += ["--moe-ffn-hidden-size", str(moe.ffn_hidden_size), "--moe-aux-loss-coeff", f"{moe.aux_loss_coeff:g}"]
    # Megatron's default is allgather; cost/layer_cost.py counts all-to-alls.
    flags += ["--moe-token-dispatcher-type", "alltoall"]
    if moe.shared_expert_intermediate_size:
        flags += ["--moe-shared-expert-intermediate-size", str(moe.shared_expert_intermediate_size)]
    if moe.has_shared_expert_gate:
        flags.append("--moe-shared-expert-gate")
    # Without the flag, topk_routing_with_score_function takes the softmax over the chosen experts only, so their
    # weights sum to 1.
    return flags if moe.is_topk_renormalized else [*flags, "--moe-router-pre-softmax"]


def list_layout_flags(model: ModelShape, layout: ParallelLayout) -> list[str]:
    """Every parallel size, which overrides the preset's recipe.

    Raises ConfigError for what no flag can switch off: the sequence parallelism of a recipe.
    """
    recipe = PRESETS[model.name].recipe if list_model_flags(model)[0] == "--preset" else None
    tp = layout.tensor_model_parallel_size
    flags = ["--tensor-model-parallel-size", str(tp)]
    flags += ["--pipeline-model-parallel-size", str(layout.pipeline_model_parallel_size)]
    flags += _list_stage_flags(layout, recipe)
    if layout.context_parallel_size > 1:
        flags += ["--context-parallel-size", str(layout.context_parallel_size)]
    if layout.expert_model_parallel_size > 1 or (recipe is not None and recipe.expert_model_parallel_size > 1):
        flags += ["--expert-model-parallel-size", str(layout.expert_model_parallel_size)]
    if layout.expert_tensor_parallel_size is not None and model.moe is not None:
        flags += ["--expert-tensor-parallel-size", str(layout.expert_tensor_parallel_size)]
    if layout.has_sequence_parallel and tp > 1:
        flags.append("--sequence-parallel")
    elif recipe is not None and recipe.has_sequence_parallel and tp > 1:
        raise ConfigError(
            f"sequence-parallel: must be on where the preset's recipe has it, got preset={model.name}, tp={tp}, "
            "has_sequence_parallel=False. Choose a layout with sequence parallelism."
        )
    return flags if layout.has_distributed_optimizer else [*flags, "--no-distributed-optimizer"]


def _list_stage_flags(layout: ParallelLayout, recipe: Recipe | None) -> list[str]:
    """How layers are split over pipeline stages and their chunks."""
    flags = []
    vp = layout.virtual_pipeline_model_parallel_size
    if vp > 1 or (recipe is not None and recipe.virtual_pipeline_model_parallel_size > 1):
        flags += ["--num-virtual-stages-per-pipeline-rank", str(vp)]
    if layout.num_layers_first_stage is not None:
        flags += ["--decoder-first-pipeline-num-layers", str(layout.num_layers_first_stage)]
    if layout.num_layers_last_stage is not None:
        flags += ["--decoder-last-pipeline-num-layers", str(layout.num_layers_last_stage)]
    if layout.accounts_for_embedding:
        flags.append("--account-for-embedding-in-pipeline-split")
    if layout.accounts_for_loss:
        flags.append("--account-for-loss-in-pipeline-split")
    return flags


def list_batch_flags(*, micro_batch_size: int, global_batch_size: int, seq_length: int) -> list[str]:
    sizes = {"micro-batch-size": micro_batch_size, "global-batch-size": global_batch_size, "seq-length": seq_length}
    return [word for flag, size in sizes.items() for word in (f"--{flag}", str(size))]


def list_recompute_flags(recompute: Recompute) -> list[str]:
    """selective recomputes the core attention; full recomputes each layer separately."""
    if recompute == "full":
        return ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return [] if recompute == "none" else ["--recompute-granularity", "selective"]


def list_plan_flags(plan: Plan, *, is_cpu: bool) -> list[str]:
    """All flags of a planned run except data, schedule, backend and outputs.

    is_cpu: its ranks are CPU processes, where no communication overlaps. Raises ConfigError as list_layout_flags does.
    """
    flags = [*list_model_flags(plan.model), "--platform", "cpu" if is_cpu else "cuda"]
    flags += list_layout_flags(plan.model, plan.layout)
    flags += list_batch_flags(
        micro_batch_size=plan.micro_batch_size,
        global_batch_size=plan.global_batch_size,
        seq_length=plan.seq_length,
    )
    # validate_args of megatron.training refuses a sequence that is longer than the positions.
    if plan.seq_length > plan.model.max_position_embeddings:
        flags += ["--max-position-embeddings", str(plan.seq_length)]
    if plan.vocab_divisible_by != DEFAULT_VOCAB_DIVISOR:
        flags += ["--make-vocab-size-divisible-by", str(plan.vocab_divisible_by)]
    flags += LOW_PRECISION_FLAGS.get(plan.precision, ("--precision", plan.precision))
    return [*flags, *list_recompute_flags(plan.recompute), *_list_data_parallel_flags(plan, is_cpu=is_cpu)]


def _list_data_parallel_flags(plan: Plan, *, is_cpu: bool) -> list[str]:
    """Sharding, overlap, and the type in which gradients are reduced."""
    flags = list(FSDP_FLAGS) if plan.sharding == "fsdp" else []
    ranks = plan.layout.dense_shard_size
    if plan.shard_size is not None and plan.shard_size < ranks and plan.sharding != "none":
        flags += ["--num-distributed-optimizer-instances", str(ranks // plan.shard_size)]
    if ranks > 1 and not is_cpu:
        flags += ["--overlap-grad-reduce"] if plan.overlaps_grad_reduce else []
        flags += ["--overlap-param-gather"] if plan.overlaps_param_gather and plan.sharding != "none" else []
    if plan.overlaps_tensor_parallel and plan.layout.tensor_model_parallel_size > 1:
        flags.append("--tp-comm-overlap")
    if plan.gradient_bytes == 2 and plan.precision != "fp32":
        flags.append("--grad-reduce-in-bf16")
    return flags
