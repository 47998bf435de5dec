"""Flags that have no effect beside the others: typed, accepted by Megatron, and never used.

Only typed flags are reported; a preset's own values are silent.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_hammer.config.flags import Flags, flag_of

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


def _is_without(name: str) -> Condition:
    return lambda flags: not flags[name]


_ROPE_WHY, _ROPE_REMEDY = "without rotary embeddings", "Drop it, or pass --position-embedding-type rope"
_TORCH_WHY, _TORCH_REMEDY = "with the torch backend, which has one attention", "Drop it, or pass --backend te on a GPU"
_LOSS_WHY = "here: the loss is computed in fp32, and fused, without it"
_LOSS_REMEDY = "Drop it; --cross-entropy chunked takes less memory"
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
        _is_without("num_experts"),
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
        _is_without("group_query_attention"),
        "without --group-query-attention",
        "Pass --group-query-attention with it",
    ),
    Idle("rotary_base", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_percent", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_interleaved", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rotary_seq_len_interpolation_factor", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("use_rope_scaling", _has_no_rope, _ROPE_WHY, _ROPE_REMEDY),
    Idle("rope_scaling_factor", _is_without("use_rope_scaling"), "alone", "Pass --use-rope-scaling with it"),
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
    Idle(
        "lr_decay_iters",  # of which a warm-up fraction is a part
        lambda flags: flags["lr_decay_style"] == "constant" and flags["lr_warmup_fraction"] is None,
        "with a constant learning rate",
        _DROP,
    ),
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
        # TransformerEngine's causal kernels take no mask tensor.
        lambda flags: flags["backend"] == "te",
        "with the te backend, whose mask is causal",
        "Pass --backend torch, or drop it",
    ),
    Idle(
        "validation_set_names",
        _is_without("multiple_validation_sets"),
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
    Idle(
        "ckpt_step",
        lambda flags: flags["load"] is None and flags["pretrained_checkpoint"] is None,
        "without --load",
        "Pass --load DIR, or drop it",
    ),
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
    # Ours
    Idle(
        "requested_world_size",
        _is_without("dry_run"),
        "without --dry-run: a run is as large as the processes that are started",
        "Pass --dry-run with it, or start that many processes with torchrun",
    ),
    Idle("json", _is_without("dry_run"), "without --dry-run", "Pass --dry-run with it"),
    # Programs and packages around the loop that this one does not start
    Idle("check_for_spiky_loss", _always, "here: the loss is checked for NaN through its gradients", _DROP),
    Idle("exit_signal_handler_for_dataloader", _always, "in megatron-core 0.19, which never reads it", _DROP),
    Idle("dist_ckpt_save_pre_mcore_014", _always, "in megatron-core 0.19, which never reads it", _DROP),
    Idle("onnx_safe", _always, "in megatron-core 0.19, which never reads it", _DROP),
    Idle(
        "openai_gelu", _always, "in megatron-core 0.19, which never reads it", "Drop it, or pass --no-bias-gelu-fusion"
    ),
    Idle("cross_entropy_loss_fusion", _always, _LOSS_WHY, _LOSS_REMEDY),
    Idle("cross_entropy_fusion_impl", _always, _LOSS_WHY, _LOSS_REMEDY),
    Idle("fp16_lm_cross_entropy", _always, _LOSS_WHY, _LOSS_REMEDY),
    Idle(
        "triton_kernels",
        lambda flags: flags["platform"] == "cpu" or flags["backend"] == "te",
        "without the torch backend on a GPU",
        _DROP,
    ),
    Idle(
        "fused_residual_rmsnorm",
        lambda flags: flags["backend"] == "te" and not flags["num_experts"],
        "in a dense model, whose norms are in TransformerEngine's linear layers",
        _DROP,
    ),
    Idle("async_save", _is_without("save"), "without --save", _SAVE_REMEDY),
    Idle(
        "async_save",
        lambda flags: flags["save"] is not None and not flags["use_persistent_ckpt_worker"],
        "without --use-persistent-ckpt-worker: megatron then saves synchronously",
        "Pass --use-persistent-ckpt-worker with it, or drop it",
    ),
)


class Family(NamedTuple):
    """Typed flags that all have no effect when `is_idle`: those whose names begin so, and others by name.

    switch: the flag that turns the others on, where its own name begins so too.
    """

    prefixes: tuple[str, ...]
    names: tuple[str, ...]
    is_idle: Condition
    why: str
    remedy: str
    switch: str | None = None


def _has_no_graphs(flags: Flags) -> bool:
    return flags["cuda_graph_impl"] in (None, "none") and not (
        flags["enable_cuda_graph"] or flags["external_cuda_graph"]
    )


FAMILIES: tuple[Family, ...] = (
    Family(("moe_",), (), _is_without("num_experts"), "without experts", "Drop it, or pass --num-experts"),
    Family(
        ("fp8_",),
        ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        lambda flags: not (flags["fp8"] or flags["fp4"]),
        "without --fp8-format: the run would train in its other precision",
        "Pass --fp8-format hybrid with it, or drop it",
    ),
    Family(("fp4_",), (), _is_without("fp4"), "without --fp4-format", "Pass --fp4-format e2m1 with it, or drop it"),
    Family(
        ("megatron_fsdp_", "fsdp_"),
        (
            "data_parallel_sharding_strategy",
            "outer_dp_sharding_strategy",
            "enable_full_sharding_in_hsdp",
            "suggested_communication_unit_size",
            "keep_fp8_transpose_cache",
            "strict_fsdp_dtensor_load",
        ),
        _is_without("use_megatron_fsdp"),
        "without --use-megatron-fsdp",
        "Pass --use-megatron-fsdp with it, or drop it",
    ),
    Family(
        ("torch_fsdp2_",),
        (),
        _is_without("use_torch_fsdp2"),
        "without --use-torch-fsdp2",
        "Pass --use-torch-fsdp2 with it, or drop it",
    ),
    Family(
        ("async_ckpt_",),
        ("async_strategy", "use_persistent_ckpt_worker"),
        _is_without("async_save"),
        "without --async-save",
        "Pass --async-save with it, or drop it",
    ),
    Family(
        ("tp_comm_",),
        (),
        _is_without("tp_comm_overlap"),
        "without --tp-comm-overlap",
        "Pass --tp-comm-overlap with it, or drop it",
        switch="tp_comm_overlap",
    ),
    Family(
        ("muon_",),
        (),
        lambda flags: "muon" not in flags["optimizer"],
        "without --optimizer muon",
        "Pass --optimizer muon with it, or drop it",
    ),
    Family(
        ("lion_",),
        (),
        # Muon updates what is not a matrix with another optimizer, which may be Lion.
        lambda flags: flags["optimizer"] != "lion" and flags["muon_scalar_optimizer"] != "lion",
        "without --optimizer lion",
        "Pass --optimizer lion with it, or drop it",
    ),
    Family(("sgd_",), (), lambda flags: flags["optimizer"] != "sgd", "without --optimizer sgd", _DROP),
    Family(
        ("cuda_graph_",),
        (),
        _has_no_graphs,
        "without --cuda-graph-impl",
        "Pass --cuda-graph-impl with it, or drop it",
        switch="cuda_graph_impl",
    ),
    Family(
        (),
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        _is_without("fp16"),
        "without --fp16, whose loss is scaled",
        _DROP,
    ),
    Family(
        (),
        ("profile_step_start", "profile_step_end", "use_pytorch_profiler", "nvtx_ranges"),
        _is_without("profile"),
        "without --profile",
        "Pass --profile with it, or drop it",
    ),
    Family(
        ("inprocess_",),
        (),
        _always,
        "here: training is not wrapped for it, a failed run is started again by its launcher",
        _DROP,
    ),
    Family(
        ("inference_", "rl_", "grpo_", "langrl_"),
        ("max_tokens_to_oom", "nccl_all_reduce_for_prefill", "use_legacy_static_engine"),
        _always,
        "while pretraining",
        _DROP,
    ),
    Family(
        ("dino_", "biencoder_", "indexer_", "retriever_", "swin_", "vision_backbone_", "vision_pretraining_"),
        (
            "num_classes",
            "img_h",
            "img_w",
            "num_channels",
            "patch_dim",
            "classes_fraction",
            "data_per_class_fraction",
            "head_lr_mult",
            "mask_type",
            "mask_factor",
            "iter_per_epoch",
            "ict_head_size",
            "ict_load",
            "bert_load",
            "titles_data_path",
            "query_in_block_prob",
            "use_one_sent_docs",
            "evidence_data_path",
            "block_data_path",
            "embedding_path",
            "mask_prob",
            "short_seq_prob",
            "sample_rate",
            "bert_embedder_type",
            "output_bert_embeddings",
        ),
        _always,
        "on a language model: it belongs to Megatron's models of images, audio or retrieval",
        _DROP,
    ),
    Family(("qk_clip_",), (), _is_without("qk_clip"), "without --qk-clip", "Pass --qk-clip with it, or drop it"),
    Family(
        ("straggler_",), (), _is_without("log_straggler"), "without --log-straggler", "Pass --log-straggler, or drop it"
    ),
    Family(
        (),
        ("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload"),
        _is_without("optimizer_cpu_offload"),
        "without --optimizer-cpu-offload",
        "Pass --optimizer-cpu-offload with it, or drop it",
    ),
    Family((), ("decoupled_min_lr",), _is_without("decoupled_lr"), "without --decoupled-lr", "Pass --decoupled-lr"),
    Family(
        (),
        ("wandb_exp_name", "wandb_entity", "wandb_save_dir"),
        _is_without("wandb_project"),
        "without --wandb-project",
        "Pass --wandb-project",
    ),
    Family(("logits_load_",), (), _always, "here: the loss has no teacher whose logits are read", _DROP),
    Family(("fim_", "sft_"), (), _always, "here: there is no such data set", _DROP),
)


def find_idle_problems(flags: Flags) -> list[str]:
    """A problem for each typed flag that would change nothing."""
    problems = []
    for idle in IDLE:
        if idle.name in flags.typed and idle.is_idle(flags):
            problems.append(_describe(idle.name, idle.why, idle.remedy))
    # Flags with a row of their own have more exact words there, and are judged by that row alone.
    reported = {idle.name for idle in IDLE}
    for family in FAMILIES:
        if family.is_idle(flags):
            problems += [
                _describe(name, family.why, family.remedy)
                for name in sorted(flags.typed - reported - {family.switch})
                if name.startswith(family.prefixes) or name in family.names
            ]
    return problems


def _describe(name: str, why: str, remedy: str) -> str:
    flag = flag_of(name)
    return f"{flag}: has no effect {why}, got --{flag} typed. {remedy}."
