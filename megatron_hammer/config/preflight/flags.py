"""Flags that would do nothing, or more than is counted: nobody should believe in a switch that is not connected.

Only flags that were typed are reported as having no effect. Tables: (attribute, when, why, remedy).
"""

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.preflight.values import flag_of
from megatron_hammer.platforms import cpu
from megatron_hammer.platforms.device import read_device_generation

Condition = Callable[[argparse.Namespace], bool]


class Idle(NamedTuple):
    """A typed flag that has no effect when `is_idle`."""

    name: str
    is_idle: Condition
    why: str
    remedy: str


def _always(_: argparse.Namespace) -> bool:
    return True


def _has_no_rope(namespace: argparse.Namespace) -> bool:
    return namespace.position_embedding_type != "rope" and not namespace.use_rotary_position_embeddings


def _is_torch(namespace: argparse.Namespace) -> bool:
    return namespace.backend == "torch"


_ROPE_WHY, _ROPE_REMEDY = "without rotary embeddings", "Drop it, or pass --position-embedding-type rope"
_TORCH_WHY, _TORCH_REMEDY = "with the torch backend, which has one attention", "Drop it, or pass --backend te on a GPU"
_SAVE_REMEDY = "Pass --save DIR, or drop it"
_DROP = "Drop it"

IDLE: tuple[Idle, ...] = (
    # Parallelism
    Idle(
        "sequence_parallel",
        lambda args: args.tensor_model_parallel_size == 1,
        "without tensor parallelism",
        "Drop it, or pass --tensor-model-parallel-size 2",
    ),
    Idle(
        "expert_tensor_parallel_size",
        lambda args: not args.num_experts,
        "without experts",
        "Drop it, or pass --num-experts",
    ),
    Idle(
        "microbatch_group_size_per_vp_stage",
        lambda args: (
            args.num_virtual_stages_per_pipeline_rank in (None, 1)
            and args.num_layers_per_virtual_pipeline_stage is None
        ),
        "without virtual pipeline stages",
        "Drop it, or pass --num-virtual-stages-per-pipeline-rank",
    ),
    # Model
    Idle(
        "num_query_groups",
        lambda args: not args.group_query_attention,
        "without --group-query-attention",
        "Pass --group-query-attention with it",
    ),
    Idle("rotary_base", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_percent", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_interleaved", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_seq_len_interpolation_factor", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("use_rope_scaling", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rope_scaling_factor", lambda args: not args.use_rope_scaling, "alone", "Pass --use-rope-scaling with it"),
    Idle("transformer_impl", _always, "here: the backend decides", "Pass --backend te or --backend torch"),
    Idle("use_flash_attn", _always, "in megatron-core 0.19: the backend chooses the attention", _DROP),
    Idle("attention_backend", _is_torch, _TORCH_WHY, _TORCH_REMEDY),
    Idle("flash_attention_version", _is_torch, _TORCH_WHY, _TORCH_REMEDY),
    Idle("apply_residual_connection_post_layernorm", _always, "in megatron-core 0.19, which never reads it", _DROP),
    # Recomputation
    Idle(
        "recompute_method",
        lambda args: args.recompute_granularity != "full",
        "without --recompute-granularity full",
        "Pass --recompute-granularity full with it",
    ),
    Idle(
        "recompute_num_layers",
        lambda args: args.recompute_granularity != "full",
        "without --recompute-granularity full",
        "Pass --recompute-granularity full with it",
    ),
    Idle(
        "recompute_modules",
        lambda args: args.recompute_granularity != "selective" and not args.recompute_activations,
        "without --recompute-granularity selective",
        "Pass --recompute-granularity selective with it",
    ),
    # Schedule and evaluation
    Idle("min_lr", lambda args: args.lr_decay_style == "constant", "with a constant learning rate", _DROP),
    Idle("lr_decay_iters", lambda args: args.lr_decay_style == "constant", "with a constant learning rate", _DROP),
    Idle(
        "lr_wsd_decay_iters",
        lambda args: args.lr_decay_style != "WSD",
        "without --lr-decay-style WSD",
        "Pass --lr-decay-style WSD with it",
    ),
    Idle(
        "rampup_batch_size",
        _always,
        "in megatron-core 0.19, which trains at the full batch from the first step",
        "Pass --step-batch-size-schedule",
    ),
    Idle(
        "eval_interval",
        lambda args: args.eval_iters == 0 and not args.full_validation,
        "without evaluation",
        "Drop it, or pass --eval-iters 10",
    ),
    # Data
    Idle(
        "reset_attention_mask",
        lambda args: args.backend == "te",
        "with the te backend, whose mask is causal",
        "Pass --backend torch, or drop it",
    ),
    Idle(
        "validation_set_names",
        lambda args: not args.multiple_validation_sets,
        "without several validation sets",
        "Pass --multiple-validation-sets and --valid-data-path with it",
    ),
    Idle("vocab_extra_ids", _always, "here: the model's rows follow from --vocab-size", "Pass a larger --vocab-size"),
    Idle("fim_data", _always, "here: there is no fill-in-the-middle data set", _DROP),
    Idle("sft", _always, "here: there is no fine-tuning data set", _DROP),
    Idle("per_dataset_sequences_path", _always, "here: the .idx is read itself", _DROP),
    Idle("dataloader_inter_document_masking", _always, "here", "Pass --reset-attention-mask with --backend torch"),
    # Checkpoints and logs
    Idle("save_interval", lambda args: args.save is None, "without --save", _SAVE_REMEDY),
    Idle("save_retain_interval", lambda args: args.save is None, "without --save", _SAVE_REMEDY),
    Idle("no_load_optim", lambda args: args.load is None, "without --load", "Pass --load DIR, or drop it"),
    Idle("no_load_rng", lambda args: args.load is None, "without --load", "Pass --load DIR, or drop it"),
    Idle("ckpt_step", lambda args: args.load is None, "without --load", "Pass --load DIR, or drop it"),
    Idle(
        "finetune",
        lambda args: args.load is None and args.pretrained_checkpoint is None,
        "without --load",
        "Pass --load DIR, or drop it",
    ),
    Idle(
        "use_checkpoint_args",
        _always,
        "here: preset and flags say what is trained",
        "Give the model by --preset or by its flags",
    ),
    Idle("wandb_exp_name", lambda args: not args.wandb_project, "without --wandb-project", "Pass --wandb-project"),
    # Ours
    Idle(
        "requested_world_size",
        lambda args: not args.dry_run,
        "without --dry-run: a run is as large as the processes that are started",
        "Pass --dry-run with it, or start that many processes with torchrun",
    ),
    Idle("json", lambda args: not args.dry_run, "without --dry-run", "Pass --dry-run with it"),
)

# Attributes that change the model or its place in a way that is neither built nor counted here, and their quiet value.
UNCOUNTED: dict[str, tuple[object, ...]] = {
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "spec": (None,),
    "yaml_cfg": (None,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "squared_relu": (False,),
    "moe_latent_size": (None,),
    "moe_layer_freq": (1,),
    "pipeline_model_parallel_layout": (None,),
    "encoder_num_layers": (None,),
    "tensor_parallel_num_weight_shards": (None, 1),
    "expert_tensor_parallel_num_weight_shards": (None, 1),
    "use_tp_pp_dp_mapping": (False,),
    "use_grouped_gemm_for_dense_mlp": (False,),
    "perform_rl_step": (False,),
    "vision_pretraining": (False,),
}
# What only TransformerEngine's modules do: (attribute, quiet values).
NEEDS_TE: dict[str, tuple[object, ...]] = {
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "layernorm_zero_centered_gamma": (False,),
    "qk_clip": (False,),
    "log_max_attention_logit": (False,),
    "delay_wgrad_compute": (False,),
    "tp_comm_overlap": (False,),
    "use_precision_aware_optimizer": (False,),
    "te_rng_tracker": (False,),
    "fp8": (None,),
    "fp4": (None,),
}


def find_flag_problems(arguments: ParsedArguments) -> list[str]:
    """Typed flags without effect, and what neither this package nor this platform and backend can do."""
    return [
        *_find_idle_problems(arguments),
        *_find_companion_problems(arguments),
        *find_uncounted_problems(arguments.namespace),
        *_find_platform_problems(arguments.namespace),
        *_find_environment_problems(arguments.namespace),
        *_find_stale_preset_problems(arguments),
    ]


def _find_idle_problems(arguments: ParsedArguments) -> list[str]:
    namespace = arguments.namespace
    problems = []
    for idle in IDLE:
        if idle.name in arguments.typed and idle.is_idle(namespace):
            flag = "world-size" if idle.name == "requested_world_size" else flag_of(idle.name)
            problems.append(f"{flag}: has no effect {idle.why}, got --{flag} typed. {idle.remedy}.")
    if not namespace.num_experts:
        for name in sorted(typed for typed in arguments.typed if typed.startswith("moe_")):
            flag = flag_of(name)
            problems.append(
                f"{flag}: has no effect without experts, got --{flag} typed. Drop it, or pass --num-experts."
            )
    return problems


def _find_companion_problems(arguments: ParsedArguments) -> list[str]:
    """Flags that need another one beside them."""
    namespace, typed = arguments.namespace, arguments.typed
    problems = []
    if "group_query_attention" in typed and "num_query_groups" not in typed:
        problems.append(
            f"num-query-groups: must be given with --group-query-attention, got "
            f"num_query_groups={namespace.num_query_groups} by default. Pass --num-query-groups."
        )
    if namespace.recompute_granularity == "full" and (
        namespace.recompute_method is None or namespace.recompute_num_layers is None
    ):
        problems.append(
            f"recompute-granularity: full needs a method and a number of layers, got "
            f"recompute_method={namespace.recompute_method}, recompute_num_layers={namespace.recompute_num_layers}. "
            "Pass --recompute-method uniform --recompute-num-layers 1."
        )
    problems += [
        f"precision: a run has one precision, got precision={namespace.precision}, --{name}. Drop --{name}."
        for name in ("bf16", "fp16")
        if {name, "precision"} <= typed and name != namespace.precision
    ]
    if namespace.wandb_project and not namespace.wandb_exp_name:
        problems.append(
            f"wandb-exp-name: must be given with --wandb-project, got wandb_exp_name={namespace.wandb_exp_name}. "
            "Pass a name for the run."
        )
    return problems


def find_uncounted_problems(namespace: argparse.Namespace) -> list[str]:
    """What would make every count of parameters or layers wrong."""
    return [
        f"{flag_of(name)}: is not supported here: it changes what is built, and its parameters and layers would not "
        f"be counted, got {name}={_show(getattr(namespace, name))}. Drop it."
        for name in _list_loud(namespace, UNCOUNTED)
    ]


def _find_platform_problems(namespace: argparse.Namespace) -> list[str]:
    problems = []
    refused = set()
    if namespace.platform == "cpu":
        for name, is_asked, why in cpu.UNSUPPORTED:
            if is_asked(getattr(namespace, name)):
                refused.add(name)
                problems.append(
                    f"{flag_of(name)}: does not work on the cpu platform, got "
                    f"{name}={_show(getattr(namespace, name))}: {why}. Drop it, or run on a GPU."
                )
    if namespace.backend != "torch":
        return problems
    names = _list_loud(namespace, NEEDS_TE)
    names += ["context_parallel_size"] if namespace.context_parallel_size > 1 else []
    return problems + [
        f"{flag_of(name)}: needs the te backend (TransformerEngine), got {name}={_show(getattr(namespace, name))}, "
        "backend=torch. Drop it, or pass --backend te on a GPU."
        for name in names
        if name not in refused
    ]


def _find_environment_problems(namespace: argparse.Namespace) -> list[str]:
    """What Megatron asks of the environment on GPUs before Blackwell, so that kernels keep their order."""
    name, value = "CUDA_DEVICE_MAX_CONNECTIONS", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    has_fsdp = namespace.use_torch_fsdp2 or namespace.use_megatron_fsdp
    if max(namespace.tensor_model_parallel_size, namespace.context_parallel_size) == 1 or has_fsdp:
        return []
    generation = read_device_generation() if namespace.platform == "cuda" else None
    if value == "1" or generation is None or generation >= 10 or namespace.overlap_moe_expert_parallel_comm:
        return []
    return [
        f"{name}: must be 1 with tensor or context parallelism on this GPU, got {name}={value}. "
        f"Run export {name}=1 before the launch."
    ]


def _find_stale_preset_problems(arguments: ParsedArguments) -> list[str]:
    """An override must not leave a number of the preset behind that followed from the old one."""
    namespace, typed = arguments.namespace, arguments.typed
    problems = []
    sizes = {"hidden_size", "num_attention_heads"}
    has_sizes = namespace.hidden_size is not None and namespace.num_attention_heads
    if arguments.preset is not None and has_sizes and sizes & typed and "kv_channels" not in typed:
        fitting = namespace.hidden_size // namespace.num_attention_heads
        if namespace.kv_channels not in (None, fitting):
            problems.append(
                f"kv-channels: the preset's no longer follows from hidden_size / num_attention_heads, got "
                f"kv_channels={namespace.kv_channels}, hidden_size={namespace.hidden_size}, "
                f"num_attention_heads={namespace.num_attention_heads}. Pass --kv-channels {fitting}."
            )
    if "padded_vocab_size" in typed:
        problems.append(
            f"padded-vocab-size: follows from --vocab-size, --make-vocab-size-divisible-by and the tensor-parallel "
            f"size, got padded_vocab_size={namespace.padded_vocab_size}. Pass those instead."
        )
    return problems


def _list_loud(namespace: argparse.Namespace, table: dict[str, tuple[object, ...]]) -> list[str]:
    """Names of the table whose value is not one of its quiet ones. An attribute that Megatron lacks is quiet."""
    return [name for name, quiet in table.items() if getattr(namespace, name, quiet[0]) not in quiet]


def _show(value: object) -> str:
    return "on" if value is True else str(value)
