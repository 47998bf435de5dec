"""What every argument of Megatron does to the computed function, from Megatron-LM 1.0 to megatron-core 0.19.

One table in three parts: EXPRESSED arguments are read by `config/model_arguments.py`, EXPRESSIBLE ones are refused
unless they have a value that the mapping expresses, INERT ones do not change what a trained model computes. An argument
of none of the parts is unknown: a newer Megatron or a fork of it has it. Sources: add_argument, the assignments to args
and the configuration classes of v1.0, v2.0, v2.5, v2.6, 23.04, 23.06 and core_v0.4.0 to core_v0.19.0.
Read next: saved_model.py.
"""

from collections.abc import Callable
from typing import Any

# Under today's names and older ones: checkpoint_files/saved_arguments.py translates.
_EXPRESSED = """
    num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups
    kv_channels vocab_size padded_vocab_size max_position_embeddings layernorm_epsilon norm_epsilon
    layernorm_zero_centered_gamma apply_layernorm_1p swiglu bias_gelu_fusion add_bias_linear disable_bias_linear
    add_qkv_bias use_rotary_position_embeddings add_position_embedding rotary_base
    untie_embeddings_and_output_weights embedding_norm init_method_std qk_layernorm use_rope_scaling
    rope_scaling_factor rotary_seq_len_interpolation_factor rotary_scaling_factor mscale mscale_all_dim
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    num_experts moe_router_topk moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_pre_softmax moe_layer_freq
    moe_aux_loss_coeff moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
    moe_router_enable_expert_bias attention_dropout hidden_dropout rotary_percent no_rope_freq residual_multiplier
    use_mup mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
"""
EXPRESSED = frozenset(_EXPRESSED.split())

_RANKED_OTHERWISE = {"sinkhorn", "quantile_balancing"}  # load balancing that is part of the choice of experts


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(number, int) for number in value)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, list) and all(number in (0, 1) for number in value)


# Argument: (the values that the mapping expresses, why no other is). Absent arguments count as unset.
EXPRESSIBLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "normalization": (lambda value: value in ("RMSNorm", "LayerNorm"), "only RMSNorm and LayerNorm are mapped"),
    "position_embedding_type": (lambda value: value in ("rope", "learned_absolute", "yarn"), "no mapping has another"),
    "rotary_interleaved": (lambda value: not value, "transformers rotates halves, not neighbouring pairs"),
    "qk_l2_norm": (lambda value: not value, "a norm without weights on queries and keys is not mapped"),
    "multi_latent_attention": (lambda value: not value, "multi-latent attention is not mapped"),
    "attention_output_gate": (lambda value: not value, "a gate on the attention output is not mapped"),
    "experimental_attention_variant": (lambda value: not value, "the attention variant is not mapped"),
    "softmax_type": (lambda value: value in (None, "vanilla"), "transformers' Llama has the plain softmax"),
    "window_size": (
        lambda value: not value or (_is_pair(value) and value[0] >= 0 and value[1] == 0),
        "a window of any other kind than (tokens before a position, 0) is not mapped",
    ),
    "window_attn_skip_freq": (
        lambda value: value is None or isinstance(value, int) or _is_pattern(value),
        "it is neither a number nor a list of 0 and 1",
    ),
    "apply_residual_connection_post_layernorm": (lambda value: not value, "no mapping has that residual"),
    "squared_relu": (lambda value: not value, "the activation is not mapped"),
    "quick_geglu": (lambda value: not value, "the activation is not mapped"),
    "openai_gelu": (lambda value: not value, "the activation is not mapped"),
    "activation_func_clamp_value": (lambda value: value is None, "a clamped activation is not mapped"),
    "glu_linear_offset": (lambda value: not value, "a shifted gate is not mapped"),
    "spec": (lambda value: not value, "its layers come from a module that this package does not know"),
    "yaml_cfg": (lambda value: not value, "the model is described in that file and not in the arguments"),
    "decoder_num_layers": (lambda value: value is None, "only models without an encoder are mapped"),
    "retro_add_retriever": (lambda value: not value, "a retriever is not mapped"),
    "vision_pretraining": (lambda value: not value, "only language models are mapped"),
    "modelopt_enabled": (lambda value: not value, "quantized weights are not mapped"),
    "rope_type": (lambda value: value in (None, "rope"), "only the plain rope is mapped"),
    "mtp_num_layers": (lambda value: not value, "multi-token prediction layers are not mapped"),
    "hybrid_layer_pattern": (lambda value: not value, "hybrid models are not mapped"),
    "hybrid_override_pattern": (lambda value: not value, "hybrid models are not mapped"),
    "hybrid_attention_ratio": (lambda value: not value, "hybrid models are not mapped"),
    "hybrid_mlp_ratio": (lambda value: not value, "hybrid models are not mapped"),
    "is_hybrid_model": (lambda value: not value, "hybrid models are not mapped"),
    "linear_attention_freq": (lambda value: not value, "linear attention is not mapped"),
    "heterogeneous_layers_config_path": (lambda value: not value, "heterogeneous layers are not mapped"),
    "heterogeneous_layers_config_encoded_json": (lambda value: not value, "heterogeneous layers are not mapped"),
    "moe_router_score_function": (
        lambda value: value in (None, "softmax", "sigmoid"),
        "the router's scores must be softmax or sigmoid",
    ),
    "moe_router_load_balancing_type": (
        lambda value: not _RANKED_OTHERWISE & set([value] if isinstance(value, str) else value or []),
        "the router must choose the largest scores",
    ),
    "moe_router_force_load_balancing": (lambda value: not value, "its router chooses at random"),
    "moe_router_force_biased": (lambda value: value is None, "its router chooses at random"),
    "moe_latent_size": (lambda value: not value, "latent experts are not mapped"),
    "moe_apply_probs_on_input": (lambda value: not value, "transformers weights the experts' outputs"),
    "moe_mlp_glu_interleave_size": (lambda value: value is None, "interleaved rows of gate and up are not mapped"),
    "moe_shared_expert_glu_interleave_size": (
        lambda value: value is None,
        "interleaved rows of gate and up are not mapped",
    ),
    "moe_expert_rank_capacity_factor": (lambda value: value is None, "transformers drops no token"),
    "moe_expert_capacity_factor": (lambda value: value is None, "transformers drops no token"),
}


# Families of arguments about the run, and of a feature whose switch is refused above.
_INERT_PREFIXES = """
    adam_ adlr_ app_tag_ async_ bert_ biencoder_ ckpt_ consumed_ cpu_offloading cuda_graph_ data_ dataloader_
    ddp_ decoupled_ dino_ disable_straggler dist_ distrib_ distributed_ dsa_ encoder_ eval_ exit_ exp_avg_
    fault_injector_ fim_ fine_grained_ flight_recorder_ fp4_ fp8_ fsdp_ ft_ grpo_ hysteresis ict_ indexer_
    inference_ inprocess_ kitchen_ langrl_ linear_ lion_ load_ log_ logits_ lr_ mamba_ manual_gc mask_
    megatron_fsdp_ moe_hybridep_ moe_ncclep_ moe_paged_stash moe_routing_trace_ moe_upcycling_ muon_ nccl_
    no_load_ no_save_ non_persistent_ null_tokenizer_ num_floating_ offload_ one_logger_ optimizer overlap_
    pin_cpu_ profile pytorch_profiler_ qk_clip query_ recompute_ record_ replication retriever_ retro_ rl_ save_
    sft_ skipped_ straggler_ tensorboard_ test_ tiktoken_ timing_log_ tokenizer_ tp_comm_ train_ use_checkpoint_
    use_dist_ckpt valid_ virtual_ vision_ wandb_
"""
# How the model is trained, laid out, rounded, started, saved or observed; or a number of a feature whose switch is
# refused above, such as kv_lora_rank of multi_latent_attention.
_INERT = """
    DDP_impl _is_global_batch_size_explicitly_specified account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split accumulate_allreduce_grads_in_fp32 activation_offload_fraction
    activations_checkpoint_method activations_checkpoint_num_layers align_grad_reduce align_param_gather
    allow_ambiguous_pad_tokens allow_transformer_engine apply_query_key_layer_scaling apply_rope_fusion
    apply_wd_to_qk_layernorm attention_backend attention_softmax_in_fp32 auto_detect_ckpt_format
    barrier_with_L1_time batch_invariant_mode batch_size bf16 bias_dropout_fusion bias_swiglu_fusion
    block_data_path cache_mla_latents calc_ft_timeouts calculate_per_token_loss chat_template
    check_for_large_grads check_for_nan_in_loss_and_grad check_for_spiky_loss
    check_weight_hash_across_dp_replicas_interval checkpoint_activations checkpoint_num_layers
    class_token_present classes_fraction clip_grad clone_scatter_output_in_embedding config_logger_dir
    context_parallel_size count cp_comm_type create_all_gather_group create_attention_mask_in_dataloader
    cross_entropy_fusion_impl cross_entropy_loss_fusion curr_iteration dataset_impl decode_only_cuda_graphs
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_seq_length
    decrease_batch_size_if_needed defer_embedding_wgrad_compute delay_grad_reduce delay_offload_until_cuda_graph
    delay_param_gather delay_wgrad_compute delta_offload_bytes_across_pp_ranks deprecated_use_mcore_models
    deterministic_mode disable_bf16_reduced_precision_matmul disable_chunked_prefill disable_jit_fuser
    disable_mamba_mem_eff_path disable_msc_deprecated disable_symmetric_registration
    distribute_checkpointed_activations distribute_saved_activations do_test do_train do_valid
    dump_param_to_param_group_map dynamic_loss_scale embedding_init_method_std embedding_path
    embedding_weights_in_fp32 empty_unused_memory_level enable_chunked_prefill enable_cuda_graph
    enable_experimental enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc
    enable_one_logger end_weight_decay eod_mask_loss eos_id ep_overlap_early_attn_memory_release
    error_injection_rate error_injection_type evidence_data_path expert_gtp_weight_remat_size
    expert_model_parallel_size expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size
    external_cuda_graph faiss_use_gpu fake_process_group finetune first_last_layers_bf16 flash_attention_version
    flash_decode fp16 fp16_lm_cross_entropy fp32_allreduce fp32_residual_connection fp4 fp8 freeze_all_layers
    full_validation fused_residual_rmsnorm global_batch_size gpu_sniff_test_interval grad_reduce_in_bf16
    gradient_accumulation_fusion gradient_reduce_div_fusion gtp_weight_remat_size head_lr_mult
    hierarchical_context_parallel_sizes high_priority_a2a_comm_stream high_priority_stream_groups
    hybrid_context_parallel img_dim img_h img_w init_method_xavier_uniform init_model_with_meta_device
    initial_loss_scale iter_per_epoch iteration iterations_to_skip keep_fp8_transpose_cache
    keep_fp8_transpose_cache_when_using_custom_fsdp kv_lora_rank lazy_mpu_init legacy_tokenizer load local_rank
    logging_level loss_scale loss_scale_window lr main_grads_dtype main_params_dtype
    make_vocab_size_divisible_by masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom
    memory_snapshot_path merge_file metadata_path micro_batch_size microbatch_group_size_per_vp_stage
    mid_level_dataset_surplus min_loss_scale min_lr min_offloaded_tensor_size min_scale mla_down_proj_fusion
    mlp_chunks_for_prefill mlp_chunks_for_training mmap_bin_files mmap_warmup mock_data model_parallel_size
    model_type moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay moe_extended_tp
    moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grouped_gemm moe_input_jitter_eps
    moe_layer_recompute moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference
    moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_bias_update_rate
    moe_router_dtype moe_router_fusion moe_router_padding_for_fp8
    moe_router_padding_for_quantization moe_router_quantile_balancing_ema moe_shared_expert_overlap
    moe_single_grouped_bias moe_single_grouped_weight moe_token_dispatcher_type moe_token_drop_policy
    moe_token_dropping moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff mrope_section
    mtp_detach_heads mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_standalone
    mtp_use_repeated_layer multiple_validation_sets mup_width_mult no_persist_layer_norm no_weight_decay_cond_type
    num_channels num_classes num_dataset_builder_threads num_distributed_optimizer_instances num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_per_virtual_pipeline_stage num_speculative_tokens
    num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges object_storage_cache_path
    offset_sampling_seed_by_dp_rank onnx_safe out_seq_length outer_dp_sharding_strategy output_bert_embeddings
    override_ckpt_iteration override_lr_scheduler override_opt_param_scheduler pad_vocab_size params_dtype
    patch_dim per_dataset_sequences_path per_split_data_args_path perform_initialization perform_rl_step
    phase_transition_iterations pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
    pipeline_model_parallel_size pipeline_model_parallel_split_rank pretrained_checkpoint q_lora_rank
    qk_head_dim qk_pos_emb_head_dim rampup_batch_size rank refit_method relative_attention_max_distance
    relative_attention_num_buckets renormalize_blend_weights report_topk_accuracies rerun_mode
    reset_attention_mask reset_position_ids result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag
    run_workload_inspector_server s3_cache_path sample_rate save scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion scatter_gather_tensors_in_pipeline seed seq_length
    sequence_parallel sft sgd_momentum sharp_enabled_group short_seq_prob skip_train special_tokens split
    standalone_embedding_stage start_eval_at_iter start_weight_decay step_batch_size_schedule
    stream_ckpt_dequant strict_fsdp_dtensor_load suggested_communication_unit_size swin_backbone_type
    symmetric_ar_type te_precision_config_file te_rng_tracker tensor_model_parallel_size
    tensor_parallel_num_weight_shards titles_data_path to_test torch_fsdp2_reshard_after_forward
    transformer_impl transformer_pipeline_model_parallel_size trust_remote_code use_contiguous_buffers_in_ddp
    use_contiguous_buffers_in_local_ddp use_cpu_initialization use_custom_fsdp use_distributed_optimizer
    use_flash_attn use_fused_weighted_squared_relu use_gloo_process_groups use_grouped_gemm_for_dense_mlp
    use_grouped_gemm_for_shared_expert use_kitchen_attention use_layer_wise_distributed_optimizer
    use_layer_wise_param_layout use_legacy_models use_legacy_static_engine use_mamba_mem_eff_path
    use_mcore_models use_megatron_fsdp use_mp_args_from_checkpoint_args use_one_sent_docs
    use_persistent_ckpt_worker use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p
    use_sharp use_te_activation_func use_tokenizer_model_from_checkpoint_args use_torch_fsdp2
    use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_op_fuser v_head_dim
    validation_set_names variable_seq_lengths verify_integrity vocab_extra_ids vocab_file warmup weight_decay
    weight_decay_incr_style wgrad_deferral_limit world_size
"""
INERT, INERT_PREFIXES = frozenset(_INERT.split()), tuple(_INERT_PREFIXES.split())


def is_known(name: str) -> bool:
    """Whether an argument is in one of the three parts."""
    return name in EXPRESSED or name in EXPRESSIBLE or name in INERT or name.startswith(INERT_PREFIXES)
