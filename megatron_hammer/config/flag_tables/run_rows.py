"""Flags of data, checkpoints and logs that have no effect beside the others, and flags of other programs."""

import importlib.util

from megatron_hammer.config.flag_tables.row import UNREAD, Idle, beside, beside_value, is_te, never, when
from megatron_hammer.config.flags import Flags

# transformers' classes too, beside the type of that name.
_HUGGING_FACE_TYPES = ("HuggingFaceTokenizer", "BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer")


def _has_no_evaluation(flags: Flags) -> bool:
    return flags["eval_iters"] == 0 and not flags["full_validation"]


DATA: tuple[Idle, ...] = (
    when(
        _has_no_evaluation,
        "without evaluation",
        "eval_interval start_eval_at_iter eval_global_batch_size eval_micro_batch_size",
        "Drop it, or pass --eval-iters 10",
    ),
    when(
        is_te,  # TransformerEngine's causal kernels take no mask tensor
        "with the te backend, whose mask is causal",
        "reset_attention_mask",
        "Pass --backend torch, or drop it",
    ),
    beside("multiple_validation_sets", "validation_set_names"),
    when(
        lambda flags: bool(flags["mock_data"]),
        "with --mock-data",
        "mmap_bin_files num_dataset_builder_threads mid_level_dataset_surplus",
        "Drop it, or pass --data-path",
    ),
    beside("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"),
    beside_value("dataloader_type", ("cyclic",), "data_sharding"),
    never("here: data are files of this machine", "object_storage_cache_path"),
    never("here: there is no such data set", "fim_ per_dataset_sequences_path"),
    beside("sft", "sft_unpacked sft_truncate sft_epochs"),
    never(
        "here: the template is part of the data, as hammer preprocess-conversations rendered them",
        "sft_tokenizer_prompt_format",
    ),
    never("here", "dataloader_inter_document_masking", "Pass --reset-attention-mask with --backend torch"),
    when(
        lambda flags: flags["tokenizer_type"] == "NullTokenizer",
        "without a tokenizer",
        "metadata_path special_tokens",
        "Pass --tokenizer-model with it, or drop it",
    ),
    beside_value("tokenizer_type", ("SentencePieceTokenizer", "GPTSentencePieceTokenizer"), "tokenizer_sentencepiece_"),
    beside_value("tokenizer_type", _HUGGING_FACE_TYPES, "tokenizer_hf_ trust_remote_code vocab_file merge_file"),
    beside_value("tokenizer_type", ("TikTokenizer",), "tiktoken_"),
    beside_value("tokenizer_type", ("NullTokenizer",), "null_tokenizer_"),
    never("while pretraining, where no conversation is formatted", "chat_template"),
)

CHECKPOINTS: tuple[Idle, ...] = (
    beside(
        "save",
        "save_ async_save no_save_ ckpt_fully_parallel_save ckpt_fully_parallel_save_process_group dist_ckpt_workers "
        "dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient non_persistent_save_interval "
        "log_progress",
        " DIR",
    ),
    beside(
        "load",
        "no_load_ ckpt_fully_parallel_load ckpt_load_ dist_ckpt_strictness stream_ckpt_dequant "
        "override_opt_param_scheduler use_checkpoint_opt_param_scheduler exit_on_missing_checkpoint "
        "auto_detect_ckpt_format load_main_params_from_ckpt override_ckpt_iteration ckpt_assume_constant_structure "
        "ckpt_convert_update_legacy_dist_opt_format non_persistent_ckpt_type",
        " DIR",
    ),
    when(
        lambda flags: flags["load"] is None and flags["pretrained_checkpoint"] is None,
        "without --load",
        "ckpt_step finetune verify_checkpoint",
        "Pass --load DIR, or drop it",
    ),
    when(  # OptimizerParamScheduler asserts it
        lambda flags: flags["override_opt_param_scheduler"],
        "with --override-opt-param-scheduler",
        "use_checkpoint_opt_param_scheduler",
        "Pass the one whose schedule counts",
    ),
    beside("save", "keep_last", " DIR"),
    beside("keep_last", "keep_every keep_iterations", " 3"),
    beside("ckpt_fully_parallel_load", "ckpt_fully_parallel_load_"),
    beside("non_persistent_ckpt_type", "non_persistent_save_interval", " global"),
    beside_value("non_persistent_ckpt_type", ("global",), "non_persistent_global_ckpt_dir"),
    beside_value(
        "non_persistent_ckpt_type",
        ("local",),
        "non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo replication",
    ),
    beside("replication", "replication_"),
    beside("ckpt_convert_format", "ckpt_convert_save", " torch_dist"),
    beside("async_save", "async_ckpt_ async_strategy use_persistent_ckpt_worker"),
    never(
        "here: preset and flags say what is trained",
        "use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args",
        "Give the model by --preset or by its flags",
    ),
    never(
        "here: every save writes hashes, and every load compares them",
        "verify_integrity",
        "Drop it; --no-verify-checkpoint leaves the comparison out",
    ),
    never(UNREAD, "dist_ckpt_save_pre_mcore_014 ckpt_fully_parallel_save_deprecated"),
    never(UNREAD, "use_dist_ckpt_deprecated dist_ckpt_format_deprecated", "Pass --ckpt-format torch_dist"),
)

WATCHING: tuple[Idle, ...] = (
    beside("evaluate_every", "evaluate_suite", " N"),
    beside(
        "tensorboard_dir",
        "tensorboard_ log_timers_to_tensorboard log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard "
        "log_memory_to_tensorboard log_world_size_to_tensorboard",
        " DIR",
    ),
    beside("timing_log_level", "barrier_with_L1_time", " 1"),
    beside("wandb_project", "wandb_", " NAME"),
    beside(
        "profile", "profile_step_start profile_step_end profile_ranks use_pytorch_profiler nvtx_ranges record_shapes"
    ),
    beside("use_pytorch_profiler", "pytorch_profiler_collect_"),
    when(lambda flags: bool(flags["use_pytorch_profiler"]), "with --use-pytorch-profiler", "record_shapes"),
    beside("record_memory_history", "memory_snapshot_path"),
    beside("log_straggler", "straggler_ disable_straggler_on_startup"),
    when(
        lambda _: importlib.util.find_spec("one_logger") is None,
        "without one_logger, a package that NVIDIA does not publish",
        "one_logger_ app_tag_",
    ),
    beside("logits_save_dir", "logits_save_", " DIR"),
    never("here: the loss has no teacher whose logits are read", "logits_load_"),
    beside("enable_ft_package", "calc_ft_timeouts ft_num_warmup_iters"),
    beside("error_injection_rate", "error_injection_type", " 1000"),
    when(
        lambda flags: flags["fault_injector_ranks"] is None and flags["fault_injector_num_ranks"] is None,
        "without --fault-injector-ranks",
        "fault_injector_",
        "Pass --fault-injector-ranks with it, or drop it",
    ),
    beside("exit_signal_handler", "exit_signal"),
    beside("adlr_autoresume", "adlr_autoresume_interval"),
    beside_value("on_bad_loss", ("roll-back",), "rolled_back_steps"),
    when(
        lambda flags: not flags["check_for_nan_in_loss_and_grad"],
        "with --no-check-for-nan-in-loss-and-grad",
        "on_bad_loss loss_spike_factor",
        "Drop one of them",
    ),
    when(
        lambda flags: flags["fp16"] and not flags["loss_scale"],
        "with dynamic loss scaling, whose scaler skips steps itself",
        "on_bad_loss loss_spike_factor",
        "Pass --loss-scale for a fixed scale, or drop it",
    ),
    never(
        "here: a loss is compared with the median of the last steps",
        "check_for_spiky_loss",
        "Pass --loss-spike-factor 3 instead",
    ),
    never(
        "here: batches that are left out are recorded in skipped_batches.jsonl, beside the checkpoints",
        "result_rejected_tracker_filename",
    ),
    never("here: training is not wrapped for it, a failed run is started again by its launcher", "inprocess_"),
    never(UNREAD, "exit_signal_handler_for_dataloader disable_msc_deprecated"),
    when(
        lambda flags: not flags["dry_run"],
        "without --dry-run: a run is as large as the processes that are started",
        "requested_world_size",
        "Pass --dry-run with it, or start that many processes with torchrun",
    ),
    beside("dry_run", "json"),
)

OTHER_PROGRAMS: tuple[Idle, ...] = (
    never(
        "while pretraining",
        "inference_ rl_ grpo_ langrl_ max_tokens_to_oom nccl_all_reduce_for_prefill use_legacy_static_engine "
        "refit_method flash_decode mlp_chunks_for_prefill decode_only_cuda_graphs enable_chunked_prefill "
        "num_speculative_tokens offset_sampling_seed_by_dp_rank mamba_inference_ test_mode",
    ),
    never(
        "on a language model: it belongs to Megatron's models of images, audio or retrieval",
        "dino_ biencoder_ indexer_ retriever_ swin_ vision_backbone_ vision_pretraining_ num_classes img_h img_w "
        "num_channels patch_dim classes_fraction data_per_class_fraction head_lr_mult mask_type mask_factor "
        "iter_per_epoch ict_head_size ict_load bert_load titles_data_path query_in_block_prob use_one_sent_docs "
        "evidence_data_path block_data_path embedding_path mask_prob short_seq_prob sample_rate bert_embedder_type "
        "output_bert_embeddings",
    ),
)
