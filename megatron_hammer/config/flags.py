"""The flags of a command line by Megatron's attribute names: a read-only view for the checks of single flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Attributes whose flag is not the attribute with dashes.
FLAG_NAMES = {
    "add_bias_linear": "disable-bias-linear",
    "add_position_embedding": "no-position-embedding",
    "align_grad_reduce": "no-align-grad-reduce",
    "align_param_gather": "no-align-param-gather",
    "apply_rope_fusion": "no-rope-fusion",
    "barrier_with_L1_time": "no-barrier-with-level-1-timing",
    "bert_binary_head": "bert-no-binary-head",
    "bias_dropout_fusion": "no-bias-dropout-fusion",
    "bias_gelu_fusion": "no-bias-gelu-fusion",
    "bias_swiglu_fusion": "no-bias-swiglu-fusion",
    "check_for_nan_in_loss_and_grad": "no-check-for-nan-in-loss-and-grad",
    "ckpt_fully_parallel_save": "no-ckpt-fully-parallel-save",
    "ckpt_fully_parallel_save_deprecated": "ckpt-fully-parallel-save",
    "ckpt_load_validate_sharding_integrity": "no-ckpt-load-validate-sharding-integrity",
    "clone_scatter_output_in_embedding": "no-clone-scatter-output-in-embedding",
    "create_attention_mask_in_dataloader": "no-create-attention-mask-in-dataloader",
    "cuda_graph_scope_deprecated": "cuda-graph-scope",
    "data_sharding": "no-data-sharding",
    "deprecated_use_mcore_models": "use-mcore-models",
    "disable_msc_deprecated": "disable-msc",
    "dist_ckpt_format_deprecated": "dist-ckpt-format",
    "dsa_indexer_rotate_activation": "no-dsa-indexer-rotate-activation",
    "dsa_indexer_scoring_relu": "no-dsa-indexer-scoring-relu",
    "enable_one_logger": "no-one-logger",
    "flight_recorder_dump_on_timeout": "no-flight-recorder-dump-on-timeout",
    "flight_recorder_extra_dump_on_exec": "no-flight-recorder-extra-dump-on-exec",
    "flight_recorder_include_only_active": "no-flight-recorder-include-only-active",
    "fp4": "fp4-format",
    "fp8": "fp8-format",
    "fp8_wgrad": "no-fp8-wgrad",
    "gradient_accumulation_fusion": "no-gradient-accumulation-fusion",
    "gradient_reduce_div_fusion": "no-gradient-reduce-div-fusion",
    "inference_dynamic_batching_enable_prefix_caching": "inference-dynamic-batching-prefix-caching",
    "layernorm_epsilon": "norm-epsilon",
    "layernorm_zero_centered_gamma": "apply-layernorm-1p",
    "log_loss_scale_to_tensorboard": "no-log-loss-scale-to-tensorboard",
    "manual_gc_eval": "no-manual-gc-eval",
    "masked_softmax_fusion": "no-masked-softmax-fusion",
    "metadata_path": "tokenizer-metadata",
    "microbatch_group_size_per_vp_stage": "microbatch-group-size-per-virtual-pipeline-stage",
    "mmap_bin_files": "no-mmap-bin-files",
    "muon_split_qkv": "muon-no-split-qkv",
    "nccl_ub": "use-nccl-ub",
    "offset_sampling_seed_by_dp_rank": "use-same-sampling-seed-across-dp-ranks",
    "overlap_p2p_comm": "no-overlap-p2p-communication",
    "overlap_p2p_comm_warmup_flush": "overlap-p2p-communication-warmup-flush",
    "pad_vocab_size": "no-pad-vocab-size",
    "perform_initialization": "no-initialization",
    "pin_cpu_grads": "no-pin-cpu-grads",
    "pin_cpu_params": "no-pin-cpu-params",
    "requested_world_size": "world-size",
    "special_tokens": "tokenizer-special-tokens",
    "stream_ckpt_dequant": "no-stream-ckpt-dequant",
    "strict_fsdp_dtensor_load": "no-strict-fsdp-dtensor-load",
    "tokenizer_sentencepiece_ignore_extra_whitespaces": "no-tokenizer-sentencepiece-ignore-extra-whitespaces",
    "torch_fsdp2_reshard_after_forward": "torch-fsdp2-no-reshard-after-forward",
    "tp_comm_bulk_dgrad": "disable-tp-comm-bulk-dgrad",
    "tp_comm_bulk_wgrad": "disable-tp-comm-bulk-wgrad",
    "tp_comm_overlap_ag": "disable-tp-comm-overlap-ag",
    "tp_comm_overlap_rs": "disable-tp-comm-overlap-rs",
    "tp_comm_split_ag": "disable-tp-comm-split-ag",
    "tp_comm_split_rs": "disable-tp-comm-split-rs",
    "use_dist_ckpt_deprecated": "use-dist-ckpt",
    "use_gloo_process_groups": "disable-gloo-process-groups",
    "use_layer_wise_param_layout": "no-use-layer-wise-param-layout",
    "use_mamba_mem_eff_path": "disable-mamba-mem-eff-path",
    "use_tokenizer_model_from_checkpoint_args": "no-use-tokenizer-model-from-checkpoint-args",
    "verify_checkpoint": "no-verify-checkpoint",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """values: of every flag, with the defaults of preset and platform. typed: names that are on the command line."""

    values: Mapping[str, Any]
    typed: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def list_loud(self, quiet_values: Mapping[str, tuple[object, ...]]) -> list[str]:
        """Names whose value is not one of its quiet ones. A flag that this Megatron does not have is quiet."""
        return [name for name, quiet in quiet_values.items() if self.values.get(name, quiet[0]) not in quiet]


def flag_of(name: str) -> str:
    """The flag of an attribute, without its leading dashes: num_layers -> num-layers."""
    return FLAG_NAMES.get(name, name.replace("_", "-"))


def show_value(value: object) -> str:
    """A flag's value in a message; of an enumeration, its name."""
    value = getattr(value, "name", value)
    return "on" if value is True else "off" if value is False else str(value)
