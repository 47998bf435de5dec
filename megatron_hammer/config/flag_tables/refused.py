"""Flags that Megatron accepts and that preflight refuses: always, or beside some others."""

from megatron_hammer.config.flag_tables.effective import EFFECTIVE
from megatron_hammer.config.flag_tables.row import Refusal
from megatron_hammer.config.flag_tables.sft import SFT_REFUSALS
from megatron_hammer.config.fused_kernels import frees_norm_outputs

# Optimizers of the package emerging-optimizers.
EMERGING = ("muon", "lion", "soap")
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
    "pipeline_model_parallel_layout": (None,),
    "encoder_num_layers": (None,),
    "decoder_num_layers": (None,),
    "tensor_parallel_num_weight_shards": (None, 1),
    "expert_tensor_parallel_num_weight_shards": (None, 1),
    "use_tp_pp_dp_mapping": (False,),
    "use_grouped_gemm_for_dense_mlp": (False,),
    "perform_rl_step": (False,),
    "vision_pretraining": (False,),
    "softmax_type": ("vanilla", "off-by-one"),  # learnable: one parameter for each head, as gpt-oss has
    "position_embedding_type": ("learned_absolute", "rope", "yarn", "none"),
}
# What would crash, or train something else, whatever is beside it: {attribute: (why, remedy)}.
ALWAYS_REFUSED: dict[str, tuple[str, str]] = {
    "hybrid_context_parallel": (
        "splits packed documents, and here every sample is one sequence",
        "Pass --context-parallel-size alone",
    ),
    "moe_use_upcycling": (
        "would build the dense model with experts",
        "Convert the dense checkpoint with hammer checkpoint edit upcycle and pass --load",
    ),
    "fp32_residual_connection": (
        "gives fp32 activations to layers whose weights are 16-bit, which neither backend takes",
        "Drop it",
    ),
    "adlr_autoresume": (
        "needs a library of one cluster, which nobody else has",
        "Drop it: the same command continues a stopped run",
    ),
    "config_logger_dir": (
        "pickles process groups, at which megatron-core 0.19 stops",
        "Drop it",
    ),
    "use_ring_exchange_p2p": (
        "calls torch.distributed.ring_exchange, which PyTorch does not have",
        "Drop it",
    ),
    "use_sharp": (
        "asks for a process group before megatron-core 0.19 has made it",
        "Drop it",
    ),
    "lazy_mpu_init": (
        "leaves the process groups to a caller that is not here",
        "Drop it",
    ),
    "save_retain_interval": (
        "removes the only checkpoint that a damaged one could fall back to",
        "Pass --keep-last 2 --keep-every STEPS",
    ),
    "fake_process_group": (
        "would train with collectives that exchange nothing",
        "Drop it; --dry-run plans a run of any size",
    ),
    "ckpt_convert_format": (
        "would convert a checkpoint and stop",
        "Drop it",
    ),
    "logits_save_dir": (
        "reads logits whose place the loss gives to their gradient",
        "Drop it",
    ),
}
# Attributes that are refused at every value but the default; the tables of flags need not know what else they do.
REFUSED = frozenset(ALWAYS_REFUSED) | (frozenset(UNCOUNTED) - EFFECTIVE)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "init_model_with_meta_device",
        lambda flags: flags["init_model_with_meta_device"] and not flags["use_megatron_fsdp"],
        "leaves the weights uninitialised: only --use-megatron-fsdp fills them",
        "Drop it",
    ),
    Refusal(
        "optimizer",
        lambda flags: flags["optimizer"] == "sgd" and flags["use_distributed_optimizer"],
        "has no state that the distributed optimizer can shard",
        "Pass --no-distributed-optimizer with it",
    ),
    Refusal(
        "optimizer",
        lambda flags: flags["optimizer"] == "sgd" and flags["use_megatron_fsdp"],
        "has no state that --use-megatron-fsdp can shard",
        "Pass --optimizer adam",
    ),
    Refusal(
        "optimizer",
        lambda flags: (
            any(name in flags["optimizer"] for name in EMERGING)
            and flags["use_distributed_optimizer"]
            and not flags["bf16"]
        ),
        "is distributed over ranks in bf16 alone (megatron.core.optimizer.layer_wise_optimizer)",
        "Pass --precision bf16, or --no-distributed-optimizer",
    ),
    Refusal(
        "optimizer",
        lambda flags: (
            any(name in flags["optimizer"] for name in EMERGING)
            and flags["use_distributed_optimizer"]
            and flags["platform"] == "cpu"
            and flags["bf16"]
            and flags["world_size"] > 1
        ),
        "would gather weights of different sizes, which gloo cannot",
        "Pass --no-distributed-optimizer with it, or run on GPUs",
    ),
    Refusal(
        "optimizer",
        lambda flags: flags["optimizer"] == "soap",
        "keeps matrices of other shapes than its weights, which megatron-core 0.19 cannot save",
        "Pass --optimizer muon",
    ),
    *(
        Refusal(
            name,
            lambda flags, name=name: flags["save"] is not None and flags[name],  # type: ignore[misc]
            "leaves out what a run needs to resume",
            "Drop it; checkpoint_convert/megatron_to_hf.py exports the weights alone",
        )
        for name in ("no_save_optim", "no_save_rng")
    ),
    Refusal(
        "ckpt_format",
        # Megatron 0.19.2 fails in DistributedOptimizer.load_parameter_state, where fp32 weights are their own masters.
        lambda flags: (
            flags["save"] is not None
            and flags["ckpt_format"] == "torch"
            and flags["use_distributed_optimizer"]
            and not (flags["bf16"] or flags["fp16"])
        ),
        "saves an optimizer that Megatron cannot load again in fp32",
        "Drop it, or pass --no-distributed-optimizer",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        lambda flags: flags["fused_residual_rmsnorm"] and flags["backend"] == "torch" and not flags["triton_kernels"],
        "is a Triton kernel on the torch backend",
        "Drop --no-triton-kernels, or drop it, or pass --backend te on a GPU",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        lambda flags: (
            flags["fused_residual_rmsnorm"] and flags["backend"] == "torch" and flags["layernorm_zero_centered_gamma"]
        ),
        "has no zero-centered weights on the torch backend",
        "Drop it, or drop --apply-layernorm-1p",
    ),
    Refusal(
        "fused_residual_rmsnorm",
        lambda flags: flags["fused_residual_rmsnorm"] and frees_norm_outputs(flags.values),
        "returns the residual, which --recompute-modules layernorm would free with the norm's output",
        "Drop it, or drop layernorm from --recompute-modules",
    ),
    Refusal(
        "attention_backend",
        lambda flags: (
            getattr(flags["attention_backend"], "name", "") in ("fused", "flash")
            and not (flags["bf16"] or flags["fp16"])
        ),
        "is a kernel of 16-bit numbers",
        "Pass --precision bf16, or drop it",
    ),
    Refusal(
        "use_rotary_position_embeddings",
        lambda flags: flags["use_rotary_position_embeddings"] and flags["position_embedding_type"] in ("yarn", "none"),
        "overrules --position-embedding-type with rope",
        "Drop one of the two",
    ),
    Refusal(
        "rotary_interleaved",
        lambda flags: flags["rotary_interleaved"] and flags["position_embedding_type"] == "yarn",
        "turns neighbouring pairs, for which megatron-core has no YaRN",
        "Drop it",
    ),
    Refusal(
        "fp8_param_gather",
        lambda flags: flags["fp8_param_gather"] and not (flags["bf16"] or flags["fp16"]),
        "needs the optimizer's master weights, which fp32 training has none of",
        "Pass --precision bf16",
    ),
    Refusal(
        "use_transformer_engine_op_fuser",
        lambda flags: flags["use_transformer_engine_op_fuser"] and flags["moe_grouped_gemm"],
        "has no fused grouped GEMM for experts",
        "Drop it, or drop --moe-grouped-gemm",
    ),
    Refusal(
        "dataloader_type",
        lambda flags: flags["dataloader_type"] == "external",
        "leaves loading to a program's own loader, and here is none",
        "Pass --dataloader-type single or cyclic, or drop it",
    ),
    Refusal(
        "dataloader_fast_cache_load",
        lambda flags: flags["dataloader_fast_cache_load"] and not flags["data_cache_path"],
        "needs the folder of the cache",
        "Pass --data-cache-path with it, or drop it",
    ),
    Refusal(
        "phase_transition_iterations",
        lambda flags: bool(flags["phase_transition_iterations"]) and flags["train_samples"] is None,
        "needs a run that is counted in samples",
        "Pass --train-samples instead of --train-iters",
    ),
    Refusal(
        "cross_entropy",
        lambda flags: (
            flags["cross_entropy"] == "chunked"
            and flags["sequence_parallel"]
            and flags["tensor_model_parallel_size"] > 1
        ),
        "would cut the sequence, which --sequence-parallel has already divided over the ranks",
        "Pass --cross-entropy in-place",
    ),
    Refusal(
        "cross_entropy",
        lambda flags: flags["cross_entropy"] == "chunked" and (flags["use_torch_fsdp2"] or flags["use_megatron_fsdp"]),
        "would use the output layer several times in a pass, of which FSDP keeps one gradient",
        "Pass --cross-entropy in-place",
    ),
    Refusal(
        "cross_entropy",
        lambda flags: flags["cross_entropy"] == "chunked" and flags["defer_embedding_wgrad_compute"],
        "would run the output layer twice, and --defer-embedding-wgrad-compute keeps its input each time",
        "Pass --cross-entropy in-place",
    ),
    Refusal(
        "distributed_backend",
        lambda flags: flags["platform"] == "cuda" and flags["distributed_backend"] == "gloo",
        "gloo has no reduce-scatter between GPUs",
        "Drop it",
    ),
    Refusal(
        "profile",
        lambda flags: flags["profile"] and flags["platform"] == "cpu" and not flags["use_pytorch_profiler"],
        "starts CUDA's profiler",
        "Pass --use-pytorch-profiler with it",
    ),
    Refusal(
        "use_pytorch_profiler",
        lambda flags: flags["profile"] and flags["use_pytorch_profiler"] and not flags["tensorboard_dir"],
        "writes beside the folder of TensorBoard",
        "Pass --tensorboard-dir DIR with it",
    ),
    Refusal(
        "wandb_project",
        lambda flags: bool(flags["wandb_project"]) and not flags["tensorboard_dir"],
        "gets its values where Megatron writes TensorBoard's",
        "Pass --tensorboard-dir DIR with it",
    ),
    Refusal(
        "wandb_project",
        lambda flags: bool(flags["wandb_project"]) and not (flags["wandb_save_dir"] or flags["save"]),
        "needs a folder",
        "Pass --wandb-save-dir DIR, or --save DIR",
    ),
    Refusal(
        "async_save",
        lambda flags: (
            flags["async_save"] and flags["ckpt_format"] != "torch_dist" and flags["async_strategy"] == "mcore"
        ),
        "writes torch_dist only",
        "Pass --ckpt-format torch_dist, or drop it",
    ),
    Refusal(
        "keep_last",
        lambda flags: flags["keep_last"] is not None and flags["ckpt_format"] != "torch_dist",
        "tells by their hashes which checkpoints this run wrote, and only the format torch_dist has them",
        "Pass --ckpt-format torch_dist with it, or drop it",
    ),
    Refusal(
        "non_persistent_ckpt_type",
        lambda flags: flags["non_persistent_ckpt_type"] == "local",
        "saves objects that only running code of the file could read again",
        "Pass --non-persistent-ckpt-type global",
    ),
    Refusal(
        "non_persistent_ckpt_type",
        lambda flags: flags["non_persistent_ckpt_type"] == "in_memory",
        "is not implemented in megatron-core 0.19",
        "Pass --non-persistent-ckpt-type global",
    ),
    *SFT_REFUSALS,
)
