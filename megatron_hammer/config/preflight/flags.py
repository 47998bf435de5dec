"""Flags that have no effect, or that change the model in ways the counts do not cover.

Only flags that were typed are reported as having no effect. The checks read single flags, so they take the flags as
they are and not the plan.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from megatron_hammer.config.flags import Flags, flag_of, show_value
from megatron_hammer.config.run_plan import RunSettings
from megatron_hammer.platforms import cpu
from megatron_hammer.platforms.device import read_device_generation

Condition = Callable[[Flags], bool]


class Idle(NamedTuple):
    """A typed flag that has no effect when `is_idle`."""

    name: str
    is_idle: Condition
    why: str
    remedy: str


def _always(_: Flags) -> bool:
    return True


def _has_no_rope(flags: Flags) -> bool:
    return flags["position_embedding_type"] != "rope" and not flags["use_rotary_position_embeddings"]


def _is_torch(flags: Flags) -> bool:
    return flags["backend"] == "torch"


_ROPE_WHY, _ROPE_REMEDY = "without rotary embeddings", "Drop it, or pass --position-embedding-type rope"
_TORCH_WHY, _TORCH_REMEDY = "with the torch backend, which has one attention", "Drop it, or pass --backend te on a GPU"
_SAVE_REMEDY = "Pass --save DIR, or drop it"
_DROP = "Drop it"

IDLE: tuple[Idle, ...] = (
    # Parallelism
    Idle(
        "sequence_parallel",
        lambda flags: flags["tensor_model_parallel_size"] == 1,
        "without tensor parallelism",
        "Drop it, or pass --tensor-model-parallel-size 2",
    ),
    Idle(
        "expert_tensor_parallel_size",
        lambda flags: not flags["num_experts"],
        "without experts",
        "Drop it, or pass --num-experts",
    ),
    Idle(
        "microbatch_group_size_per_vp_stage",
        lambda flags: (
            flags["num_virtual_stages_per_pipeline_rank"] in (None, 1)
            and flags["num_layers_per_virtual_pipeline_stage"] is None
        ),
        "without virtual pipeline stages",
        "Drop it, or pass --num-virtual-stages-per-pipeline-rank",
    ),
    # Model
    Idle(
        "num_query_groups",
        lambda flags: not flags["group_query_attention"],
        "without --group-query-attention",
        "Pass --group-query-attention with it",
    ),
    Idle("rotary_base", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_percent", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_interleaved", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_seq_len_interpolation_factor", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("use_rope_scaling", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle(
        "rope_scaling_factor", lambda flags: not flags["use_rope_scaling"], "alone", "Pass --use-rope-scaling with it"
    ),
    Idle("transformer_impl", _always, "here: the backend decides", "Pass --backend te or --backend torch"),
    Idle("use_flash_attn", _always, "in megatron-core 0.19: the backend chooses the attention", _DROP),
    Idle("attention_backend", _is_torch, _TORCH_WHY, _TORCH_REMEDY),
    Idle("flash_attention_version", _is_torch, _TORCH_WHY, _TORCH_REMEDY),
    Idle("apply_residual_connection_post_layernorm", _always, "in megatron-core 0.19, which never reads it", _DROP),
    # Recomputation
    Idle(
        "recompute_method",
        lambda flags: flags["recompute_granularity"] != "full",
        "without --recompute-granularity full",
        "Pass --recompute-granularity full with it",
    ),
    Idle(
        "recompute_num_layers",
        lambda flags: flags["recompute_granularity"] != "full",
        "without --recompute-granularity full",
        "Pass --recompute-granularity full with it",
    ),
    Idle(
        "recompute_modules",
        lambda flags: flags["recompute_granularity"] != "selective" and not flags["recompute_activations"],
        "without --recompute-granularity selective",
        "Pass --recompute-granularity selective with it",
    ),
    # Schedule and evaluation
    Idle("min_lr", lambda flags: flags["lr_decay_style"] == "constant", "with a constant learning rate", _DROP),
    Idle("lr_decay_iters", lambda flags: flags["lr_decay_style"] == "constant", "with a constant learning rate", _DROP),
    Idle(
        "lr_wsd_decay_iters",
        lambda flags: flags["lr_decay_style"] != "WSD",
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
        lambda flags: flags["eval_iters"] == 0 and not flags["full_validation"],
        "without evaluation",
        "Drop it, or pass --eval-iters 10",
    ),
    # Data
    Idle(
        "reset_attention_mask",
        lambda flags: flags["backend"] == "te",
        "with the te backend, whose mask is causal",
        "Pass --backend torch, or drop it",
    ),
    Idle(
        "validation_set_names",
        lambda flags: not flags["multiple_validation_sets"],
        "without several validation sets",
        "Pass --multiple-validation-sets and --valid-data-path with it",
    ),
    Idle("vocab_extra_ids", _always, "here: the model's rows follow from --vocab-size", "Pass a larger --vocab-size"),
    Idle("fim_data", _always, "here: there is no fill-in-the-middle data set", _DROP),
    Idle("sft", _always, "here: there is no fine-tuning data set", _DROP),
    Idle("per_dataset_sequences_path", _always, "here: the .idx is read itself", _DROP),
    Idle("dataloader_inter_document_masking", _always, "here", "Pass --reset-attention-mask with --backend torch"),
    # Checkpoints and logs
    Idle("save_interval", lambda flags: flags["save"] is None, "without --save", _SAVE_REMEDY),
    Idle("save_retain_interval", lambda flags: flags["save"] is None, "without --save", _SAVE_REMEDY),
    Idle("no_load_optim", lambda flags: flags["load"] is None, "without --load", "Pass --load DIR, or drop it"),
    Idle("no_load_rng", lambda flags: flags["load"] is None, "without --load", "Pass --load DIR, or drop it"),
    Idle("ckpt_step", lambda flags: flags["load"] is None, "without --load", "Pass --load DIR, or drop it"),
    Idle(
        "finetune",
        lambda flags: flags["load"] is None and flags["pretrained_checkpoint"] is None,
        "without --load",
        "Pass --load DIR, or drop it",
    ),
    Idle(
        "use_checkpoint_args",
        _always,
        "here: preset and flags say what is trained",
        "Give the model by --preset or by its flags",
    ),
    Idle("wandb_exp_name", lambda flags: not flags["wandb_project"], "without --wandb-project", "Pass --wandb-project"),
    # Ours
    Idle(
        "requested_world_size",
        lambda flags: not flags["dry_run"],
        "without --dry-run: a run is as large as the processes that are started",
        "Pass --dry-run with it, or start that many processes with torchrun",
    ),
    Idle("json", lambda flags: not flags["dry_run"], "without --dry-run", "Pass --dry-run with it"),
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


def find_flag_problems(settings: RunSettings) -> list[str]:
    """Typed flags without effect, and what neither this package nor this platform and backend can do."""
    flags = settings.flags
    return [
        *_find_idle_problems(flags),
        *_find_companion_problems(flags),
        *find_uncounted_problems(flags),
        *_find_platform_problems(flags),
        *_find_environment_problems(flags),
        *_find_stale_preset_problems(flags, has_preset=settings.preset is not None),
    ]


def _find_idle_problems(flags: Flags) -> list[str]:
    problems = []
    for idle in IDLE:
        if idle.name in flags.typed and idle.is_idle(flags):
            flag = flag_of(idle.name)
            problems.append(f"{flag}: has no effect {idle.why}, got --{flag} typed. {idle.remedy}.")
    if not flags["num_experts"]:
        for name in sorted(typed for typed in flags.typed if typed.startswith("moe_")):
            flag = flag_of(name)
            problems.append(
                f"{flag}: has no effect without experts, got --{flag} typed. Drop it, or pass --num-experts."
            )
    return problems


def _find_companion_problems(flags: Flags) -> list[str]:
    """Flags that need another one beside them."""
    typed = flags.typed
    problems = []
    if "group_query_attention" in typed and "num_query_groups" not in typed:
        problems.append(
            f"num-query-groups: must be given with --group-query-attention, got "
            f"num_query_groups={flags['num_query_groups']} by default. Pass --num-query-groups."
        )
    if flags["recompute_granularity"] == "full" and (
        flags["recompute_method"] is None or flags["recompute_num_layers"] is None
    ):
        problems.append(
            f"recompute-granularity: full needs a method and a number of layers, got "
            f"recompute_method={flags['recompute_method']}, recompute_num_layers={flags['recompute_num_layers']}. "
            "Pass --recompute-method uniform --recompute-num-layers 1."
        )
    problems += [
        f"precision: a run has one precision, got precision={flags['precision']}, --{name}. Drop --{name}."
        for name in ("bf16", "fp16")
        if {name, "precision"} <= typed and name != flags["precision"]
    ]
    if flags["wandb_project"] and not flags["wandb_exp_name"]:
        problems.append(
            f"wandb-exp-name: must be given with --wandb-project, got wandb_exp_name={flags['wandb_exp_name']}. "
            "Pass a name for the run."
        )
    return problems


def find_uncounted_problems(flags: Flags) -> list[str]:
    """What would make every count of parameters or layers wrong."""
    return [
        f"{flag_of(name)}: is not supported here: it changes what is built, and its parameters and layers would not "
        f"be counted, got {name}={show_value(flags[name])}. Drop it."
        for name in flags.list_loud(UNCOUNTED)
    ]


def _find_platform_problems(flags: Flags) -> list[str]:
    problems = []
    refused = set()
    if flags["platform"] == "cpu":
        for name, is_asked, why in cpu.UNSUPPORTED:
            if is_asked(flags[name]):
                refused.add(name)
                problems.append(
                    f"{flag_of(name)}: does not work on the cpu platform, got "
                    f"{name}={show_value(flags[name])}: {why}. Drop it, or run on a GPU."
                )
    if flags["backend"] != "torch":
        return problems
    names = flags.list_loud(NEEDS_TE)
    names += ["context_parallel_size"] if flags["context_parallel_size"] > 1 else []
    return problems + [
        f"{flag_of(name)}: needs the te backend (TransformerEngine), got {name}={show_value(flags[name])}, "
        "backend=torch. Drop it, or pass --backend te on a GPU."
        for name in names
        if name not in refused
    ]


def _find_environment_problems(flags: Flags) -> list[str]:
    """What Megatron asks of the environment on GPUs before Blackwell, so that kernels keep their order."""
    name, value = "CUDA_DEVICE_MAX_CONNECTIONS", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    has_fsdp = flags["use_torch_fsdp2"] or flags["use_megatron_fsdp"]
    if max(flags["tensor_model_parallel_size"], flags["context_parallel_size"]) == 1 or has_fsdp:
        return []
    generation = read_device_generation() if flags["platform"] == "cuda" else None
    if value == "1" or generation is None or generation >= 10 or flags["overlap_moe_expert_parallel_comm"]:
        return []
    return [
        f"{name}: must be 1 with tensor or context parallelism on this GPU, got {name}={value}. "
        f"Run export {name}=1 before the launch."
    ]


def _find_stale_preset_problems(flags: Flags, *, has_preset: bool) -> list[str]:
    """An override must not leave a number of the preset behind that followed from the old one."""
    typed = flags.typed
    problems = []
    sizes = {"hidden_size", "num_attention_heads"}
    has_sizes = flags["hidden_size"] is not None and flags["num_attention_heads"]
    if has_preset and has_sizes and sizes & typed and "kv_channels" not in typed:
        fitting = flags["hidden_size"] // flags["num_attention_heads"]
        if flags["kv_channels"] not in (None, fitting):
            problems.append(
                f"kv-channels: the preset's no longer follows from hidden_size / num_attention_heads, got "
                f"kv_channels={flags['kv_channels']}, hidden_size={flags['hidden_size']}, "
                f"num_attention_heads={flags['num_attention_heads']}. Pass --kv-channels {fitting}."
            )
    if "padded_vocab_size" in typed:
        problems.append(
            f"padded-vocab-size: follows from --vocab-size, --make-vocab-size-divisible-by and the tensor-parallel "
            f"size, got padded_vocab_size={flags['padded_vocab_size']}. Pass those instead."
        )
    return problems
