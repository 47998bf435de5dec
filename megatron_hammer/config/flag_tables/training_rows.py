"""Flags of parallelism, optimizer, number formats and recomputation that have no effect beside the others."""

from megatron_hammer.config.flag_tables.row import Idle, beside, beside_value, is_cpu, never, when
from megatron_hammer.config.flags import Flags


def _has_no_virtual_stages(flags: Flags) -> bool:
    return (
        flags["num_virtual_stages_per_pipeline_rank"] in (None, 1)
        and flags["num_layers_per_virtual_pipeline_stage"] is None
    )


def _has_no_graphs(flags: Flags) -> bool:
    return flags["cuda_graph_impl"] in (None, "none") and not (
        flags["enable_cuda_graph"] or flags["external_cuda_graph"]
    )


def _has_no_lion(flags: Flags) -> bool:
    return flags["optimizer"] != "lion" and not _has_lion_beside_muon(flags)


def _has_lion_beside_muon(flags: Flags) -> bool:
    """Muon updates what is not a matrix with another optimizer: Adam, or Lion."""
    return "muon" in flags["optimizer"] and flags["muon_scalar_optimizer"] == "lion"


PARALLELISM: tuple[Idle, ...] = (
    when(
        lambda flags: flags["tensor_model_parallel_size"] == 1,
        "without tensor parallelism",
        "sequence_parallel tp_comm_ distribute_saved_activations",
        "Drop it, or pass --tensor-model-parallel-size 2",
    ),
    beside("tp_comm_overlap", "tp_comm_"),
    when(
        lambda flags: not flags["sequence_parallel"] or flags["tensor_model_parallel_size"] == 1,
        "without sequence parallelism",
        "clone_scatter_output_in_embedding",
        "Drop it, or pass --sequence-parallel with tensor parallelism",
    ),
    when(
        lambda flags: flags["pipeline_model_parallel_size"] == 1,
        "without pipeline parallelism",
        "pipeline_model_parallel_comm_backend account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
        "defer_embedding_wgrad_compute",
        "Drop it, or pass --pipeline-model-parallel-size 2",
    ),
    when(
        _has_no_virtual_stages,
        "without virtual pipeline stages",
        "microbatch_group_size_per_vp_stage overlap_p2p_comm overlap_p2p_comm_warmup_flush",
        "Drop it, or pass --num-virtual-stages-per-pipeline-rank",
    ),
    beside("defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
    when(
        lambda flags: flags["context_parallel_size"] == 1,
        "without context parallelism",
        "cp_comm_type hierarchical_context_parallel_sizes",
        "Drop it, or pass --context-parallel-size 2",
    ),
    when(
        lambda flags: "a2a+p2p" not in flags["cp_comm_type"],
        "without --cp-comm-type a2a+p2p",
        "hierarchical_context_parallel_sizes",
        "Pass --cp-comm-type a2a+p2p with it, or drop it",
    ),
    never("here: samples are whole sequences, which are not packed by length", "max_seqlen_per_dp_cp_rank"),
    beside("overlap_grad_reduce", "align_grad_reduce ddp_num_buckets ddp_bucket_size"),
    beside("overlap_param_gather", "align_param_gather"),
    when(
        lambda flags: not flags["use_distributed_optimizer"],
        "without the distributed optimizer",
        "num_distributed_optimizer_instances ddp_pad_buckets_for_high_nccl_busbw "
        "distrib_optim_fully_reshardable_mem_efficient",
        "Drop it, or drop --no-distributed-optimizer",
    ),
    beside("nccl_ub", "disable_symmetric_registration"),
    beside("use_sharp", "sharp_enabled_group"),
    beside(
        "use_megatron_fsdp",
        "megatron_fsdp_ fsdp_ data_parallel_sharding_strategy outer_dp_sharding_strategy "
        "enable_full_sharding_in_hsdp suggested_communication_unit_size keep_fp8_transpose_cache "
        "strict_fsdp_dtensor_load gradient_reduce_div_fusion create_all_gather_group",
    ),
    beside("use_torch_fsdp2", "torch_fsdp2_"),
    when(
        is_cpu,
        "on the cpu platform",
        "empty_unused_memory_level train_sync_interval high_priority_stream_groups nccl_communicator_config_path "
        "flight_recorder_dump_path disable_bf16_reduced_precision_matmul",
        "Drop it, or run on a GPU",
    ),
    beside("flight_recorder_dump_path", "flight_recorder_", " DIR"),
    never("in megatron-core 0.19, which reads the launcher's LOCAL_RANK", "local_rank"),
)

OPTIMIZER: tuple[Idle, ...] = (
    when(lambda flags: flags["lr_decay_style"] == "constant", "with a constant learning rate", "min_lr"),
    when(
        # A warm-up fraction is a part of the decay.
        lambda flags: flags["lr_decay_style"] == "constant" and flags["lr_warmup_fraction"] is None,
        "with a constant learning rate",
        "lr_decay_iters lr_decay_samples",
    ),
    beside_value("lr_decay_style", ("WSD",), "lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style"),
    when(
        lambda flags: not (flags["lr_warmup_iters"] or flags["lr_warmup_samples"] or flags["lr_warmup_fraction"]),
        "without a warm-up",
        "lr_warmup_init",
        "Pass --lr-warmup-iters with it, or drop it",
    ),
    when(
        lambda flags: flags["weight_decay_incr_style"] == "constant",
        "without --weight-decay-incr-style linear or cosine",
        "start_weight_decay end_weight_decay",
        "Pass --weight-decay alone, or the style with it",
    ),
    beside("decoupled_lr", "decoupled_min_lr"),
    when(
        lambda flags: "muon" not in flags["optimizer"],
        "without --optimizer muon",
        "muon_",
        "Pass --optimizer muon with it, or drop it",
    ),
    when(_has_no_lion, "without --optimizer lion", "lion_", "Pass --optimizer lion with it, or drop it"),
    beside_value("optimizer", ("sgd",), "sgd_"),
    when(
        lambda flags: flags["optimizer"] in ("sgd", "lion") or _has_lion_beside_muon(flags),
        "without Adam, whose moments it is for",
        "adam_",
    ),
    when(
        lambda flags: "muon" not in flags["optimizer"] or not flags["use_distributed_optimizer"],
        "without --optimizer muon and the distributed optimizer",
        "use_layer_wise_param_layout",
    ),
    beside("use_precision_aware_optimizer", "main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype"),
    beside(
        "optimizer_cpu_offload",
        "optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads "
        "pin_cpu_params",
    ),
    never(
        "in megatron-core 0.19, which trains at the full batch from the first step",
        "rampup_batch_size",
        "Pass --step-batch-size-schedule",
    ),
    *(
        never("in megatron-core 0.19, which refuses it", name, f"Pass --{remedy}")
        for name, remedy in (
            ("batch_size", "micro-batch-size"),
            ("warmup", "lr-warmup-fraction"),
            ("model_parallel_size", "tensor-model-parallel-size"),
            ("checkpoint_activations", "recompute-granularity full"),
        )
    ),
)

FORMATS_AND_SPEED: tuple[Idle, ...] = (
    beside("bf16", "disable_bf16_reduced_precision_matmul grad_reduce_in_bf16"),
    when(
        lambda flags: not (flags["bf16"] or flags["fp16"]),
        "without 16-bit weights",
        "loss_scale accumulate_allreduce_grads_in_fp32",
        "Pass --precision bf16, or drop it",
    ),
    when(
        lambda flags: not flags["fp16"],
        "without --fp16, whose loss is scaled",
        "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    ),
    when(
        lambda flags: not (flags["fp8"] or flags["fp4"]),
        "without --fp8-format: the run would train in its other precision",
        "fp8_ first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 "
        "reuse_grad_buf_for_mxfp8_param_ag",
        "Pass --fp8-format hybrid with it, or drop it",
    ),
    beside("fp4", "fp4_", " e2m1"),
    beside_value(
        "recompute_granularity", ("full",), "recompute_method recompute_num_layers distribute_saved_activations"
    ),
    when(
        lambda flags: flags["recompute_granularity"] != "selective" and not flags["recompute_activations"],
        "without --recompute-granularity selective",
        "recompute_modules",
        "Pass --recompute-granularity selective with it",
    ),
    beside("cpu_offloading_num_layers", "cpu_offloading_retain_pinned_cpu_buffers", " 2"),
    beside(
        "fine_grained_activation_offloading",
        "offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks "
        "activation_offload_fraction fine_grained_offloading_max_inflight_offloads",
    ),
    when(
        _has_no_graphs, "without --cuda-graph-impl", "cuda_graph_", "Pass --cuda-graph-impl local with it, or drop it"
    ),
    beside("manual_gc", "manual_gc_interval manual_gc_eval"),
)
