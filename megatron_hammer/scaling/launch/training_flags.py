"""A model, a layout and a batch as flags of megatron_hammer.training.pretrain: what `measure` runs and `emit` writes.

Sizes that a preset's recipe sets are always given, so a layout means the same with every recipe. Data, schedule and
outputs are left out; `emit` adds those.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.presets.preset import Recipe
from megatron_hammer.scaling.cost.context_parallel import find_all_to_all_size
from megatron_hammer.scaling.plan import Plan, Recompute

# Flags of a run with matrix products in 8 or 4 bits; everything else is in 16 bits. TransformerEngine's recipes.
LOW_PRECISION_FLAGS = {
    "fp8": ("--precision", "bf16", "--fp8-format", "hybrid"),
    "fp8_blockwise": ("--precision", "bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    "mxfp8": ("--precision", "bf16", "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"),
    "nvfp4": ("--precision", "bf16", "--fp4-format", "e2m1"),
}
# validate_args of megatron.training refuses Megatron-FSDP with any other checkpoint format.
FSDP_FLAGS = (
    *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
    *("--ckpt-format", "fsdp_dtensor"),
)
DEFAULT_VOCAB_DIVISOR = 128
DEFAULT_RECOMPUTE_MODULES = ("core_attn",)  # recompute_modules of megatron.core's TransformerConfig


# Megatron's arguments of a model in the order in which a script has their flags. Any other follows.
_ARGUMENT_ORDER = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "vocab_size"),
    *("max_position_embeddings", "normalization", "layernorm_epsilon", "init_method_std", "position_embedding_type"),
    *("rotary_base", "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
    *("group_query_attention", "num_query_groups", "swiglu", "bias_gelu_fusion", "add_bias_linear", "add_qkv_bias"),
    *("untie_embeddings_and_output_weights", "embedding_norm", "qk_layernorm"),
    *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_aux_loss_coeff", "moe_token_dispatcher_type"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_pre_softmax"),
)
# These are on by default, so the flag switches them off.
_OFF_SWITCHES = {
    "add_bias_linear": "--disable-bias-linear",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
    "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int",
}


def find_recipe(model: ModelShape) -> Recipe | None:
    """The recipe of the shipped preset that this model is; None for any other model, whatever its name."""
    preset = PRESETS.get(model.name)
    return preset.recipe if preset is not None and preset.model == model else None


def list_model_flags(model: ModelShape, arguments: Mapping[str, Any]) -> list[str]:
    """--preset for a shipped model, otherwise (a Hugging Face model) its architecture flag by flag.

    arguments: the model as build_model_arguments of config/model_arguments.py gives it. The caller passes it, because
    scaling/ stands below config/ and may not import it.
    """
    if find_recipe(model) is not None:
        return ["--preset", model.name]
    # Arguments that Megatron ignores, or would refuse, beside the model's other arguments.
    unused = {
        "num_query_groups": not arguments["group_query_attention"],
        "rotary_base": arguments["position_embedding_type"] not in ("rope", "yarn"),
        "rotary_percent": arguments["rotary_percent"] == 1,
        "residual_multiplier": arguments["residual_multiplier"] == 1,
        # Attention of megatron.core has this bias already if all linears have one.
        "add_qkv_bias": arguments["add_bias_linear"],
    }
    names = [name for name in dict.fromkeys((*_ARGUMENT_ORDER, *arguments)) if name in arguments]
    return [word for name in names if not unused.get(name) for word in _spell_argument(name, arguments[name])]


def _spell_argument(name: str, value: Any) -> list[str]:
    if name in _OFF_SWITCHES:
        return [] if value else [_OFF_SWITCHES[name]]
    # The only argument of a model whose flag has another name than its attribute.
    flag = "--norm-epsilon" if name == "layernorm_epsilon" else f"--{name.replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, str(value).replace(" ", "")]
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))]
    if not isinstance(value, float):
        return [flag, str(value)]
    # The short spelling where it is the same number.
    short = f"{value:g}"
    return [flag, short if float(short) == value else repr(value)]


def list_layout_flags(model: ModelShape, layout: ParallelLayout) -> list[str]:
    """Every parallel size, which overrides the preset's recipe.

    Raises ConfigError for what no flag can switch off: the sequence parallelism of a recipe.
    """
    recipe = find_recipe(model)
    tp = layout.tensor_model_parallel_size
    flags = ["--tensor-model-parallel-size", str(tp)]
    flags += ["--pipeline-model-parallel-size", str(layout.pipeline_model_parallel_size)]
    flags += _list_stage_flags(layout, recipe)
    if layout.context_parallel_size > 1:
        flags += ["--context-parallel-size", str(layout.context_parallel_size)]
    if layout.expert_model_parallel_size > 1 or (recipe is not None and recipe.expert_model_parallel_size > 1):
        flags += ["--expert-model-parallel-size", str(layout.expert_model_parallel_size)]
    has_expert_tp = recipe is not None and recipe.expert_tensor_parallel_size is not None
    if model.moe is not None and (has_expert_tp or layout.expert_tensor_parallel_size is not None):
        flags += ["--expert-tensor-parallel-size", str(layout.expert_tp)]
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


def list_recompute_flags(
    recompute: Recompute, modules: tuple[str, ...] = DEFAULT_RECOMPUTE_MODULES, num_layers: int | None = None
) -> list[str]:
    """modules: what selective recomputes. full recomputes each layer separately, or the first num_layers of a chunk."""
    if recompute == "full":
        method, number = ("uniform", 1) if num_layers is None else ("block", num_layers)
        return ["--recompute-granularity", "full", "--recompute-method", method, "--recompute-num-layers", str(number)]
    if recompute == "none":
        return []
    named = [] if modules == DEFAULT_RECOMPUTE_MODULES else ["--recompute-modules", *modules]
    return ["--recompute-granularity", "selective", *named]


def _list_memory_flags(plan: Plan) -> list[str]:
    """Quantized parameters, and what waits on the host."""
    flags = []
    if plan.has_quantized_parameters and plan.precision in LOW_PRECISION_FLAGS:
        flags += ["--fp4-param-gather"] if plan.precision == "nvfp4" else ["--fp8-param-gather"]
        # Megatron-FSDP has a buffer of its own for the gathered weights.
        if plan.precision == "mxfp8" and plan.sharding != "fsdp":
            flags.append("--reuse-grad-buf-for-mxfp8-param-ag")
    if plan.num_offloaded_layers:
        flags += ["--cpu-offloading-num-layers", str(plan.num_offloaded_layers)]
    if plan.offload_modules:
        flags += ["--fine-grained-activation-offloading", "--offload-modules", *plan.offload_modules]
    if plan.optimizer_offload_ratio:
        # Megatron asks for the precision-aware optimizer beside it.
        flags += ["--optimizer-cpu-offload", "--optimizer-offload-fraction", f"{plan.optimizer_offload_ratio:g}"]
        flags += ["--use-precision-aware-optimizer", "--overlap-cpu-optimizer-d2h-h2d"]
    return flags


def list_plan_flags(plan: Plan, model_arguments: Mapping[str, Any], *, is_cpu: bool) -> list[str]:
    """All flags of a planned run except data, schedule, backend and outputs.

    model_arguments: see list_model_flags. is_cpu: its ranks are CPU processes, where no communication overlaps. Raises
    ConfigError as list_layout_flags does.
    """
    if plan.model.moe is not None:
        model_arguments = {**model_arguments, "moe_token_dispatcher_type": plan.experts.dispatcher_type}
    flags = [*list_model_flags(plan.model, model_arguments), "--platform", "cpu" if is_cpu else "cuda"]
    flags += list_layout_flags(plan.model, plan.layout)
    flags += [] if plan.model.moe is None else _list_expert_flags(plan, is_cpu=is_cpu)
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
    flags += _list_context_flags(plan)
    flags += LOW_PRECISION_FLAGS.get(plan.precision, ("--precision", plan.precision))
    flags += list_recompute_flags(plan.recompute, plan.recompute_modules, plan.recompute_num_layers)
    return [*flags, *_list_memory_flags(plan), *_list_data_parallel_flags(plan, is_cpu=is_cpu)]


def _list_expert_flags(plan: Plan, *, is_cpu: bool) -> list[str]:
    """How experts are computed. The imbalance is no flag: it is what the data and the router make of it."""
    options, flags = plan.experts, list[str]()
    # A model that is no preset has the dispatcher among its own flags.
    if find_recipe(plan.model) is not None and options.dispatcher_type != "alltoall":
        flags += ["--moe-token-dispatcher-type", options.dispatcher_type]
    if options.dispatcher_type == "flex":
        flags += ["--moe-flex-dispatcher-backend", options.dispatcher]
    if options.overlaps_communication:
        flags.append("--overlap-moe-expert-parallel-comm")
    return flags if is_cpu or not options.has_grouped_gemm else [*flags, "--moe-grouped-gemm"]


def _list_context_flags(plan: Plan) -> list[str]:
    """How the ranks of one sequence exchange keys, values or heads; p2p is Megatron's default."""
    layout, exchange = plan.layout, plan.context_exchange
    cp = layout.context_parallel_size
    if cp == 1 or exchange == "p2p":
        return []
    flags = ["--cp-comm-type", exchange]
    if exchange != "a2a+p2p":
        return flags
    inner = find_all_to_all_size(exchange, plan.model, layout.tensor_model_parallel_size, cp, plan.cluster) or 1
    return [*flags, "--hierarchical-context-parallel-sizes", str(inner), str(cp // inner)]


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
