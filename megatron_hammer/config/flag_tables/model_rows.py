"""Flags of the model that have no effect beside the others."""

from megatron_hammer.config.flag_tables.row import (
    UNREAD,
    Idle,
    beside,
    beside_value,
    is_cpu,
    is_te,
    is_torch,
    never,
    when,
)
from megatron_hammer.config.flags import Flags


def _has_no_rope(flags: Flags) -> bool:
    return flags["position_embedding_type"] not in ("rope", "yarn") and not flags["use_rotary_position_embeddings"]


def _ignores_changed_swiglu(flags: Flags) -> bool:
    # megatron.core.fusions.fused_bias_swiglu takes neither an offset nor a limit.
    return not flags["swiglu"] or flags["bias_swiglu_fusion"]


MODEL: tuple[Idle, ...] = (
    beside("group_query_attention", "num_query_groups"),
    when(
        _has_no_rope,
        "without rotary embeddings",
        "rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling "
        "no_rope_freq apply_rope_fusion",
        "Drop it, or pass --position-embedding-type rope",
    ),
    beside("use_rope_scaling", "rope_scaling_factor"),
    beside_value("position_embedding_type", ("yarn",), "yarn_ rotary_scaling_factor mscale mscale_all_dim"),
    when(
        lambda flags: flags["position_embedding_type"] == "yarn",
        "with --position-embedding-type yarn",
        "rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling apply_rope_fusion",
    ),
    beside("window_size", "window_attn_skip_freq", " 128,0"),
    beside("qk_layernorm", "apply_wd_to_qk_layernorm no_weight_decay_cond_type"),
    beside("qk_clip", "qk_clip_"),
    beside("use_mup", "mup_"),
    when(
        _ignores_changed_swiglu,
        "unless SwiGLU is computed without fusion",
        "glu_linear_offset activation_func_clamp_value",
        "Pass --swiglu --no-bias-swiglu-fusion with it, or drop it",
    ),
    when(lambda flags: bool(flags["swiglu"]), "with --swiglu", "bias_gelu_fusion"),
    beside("swiglu", "bias_swiglu_fusion"),
    never("here: the backend decides", "transformer_impl", "Pass --backend te or --backend torch"),
    never("in megatron-core 0.19: the backend chooses the attention", "use_flash_attn"),
    never("here: the attention of neither backend reads it", "attention_softmax_in_fp32 masked_softmax_fusion"),
    never("here: neither backend has that norm", "no_persist_layer_norm"),
    never(
        "in megatron-core 0.19, where the type of position embedding decides",
        "add_position_embedding",
        "Pass --position-embedding-type none",
    ),
    never("outside multi-latent attention, which is not supported here", "rope_type"),
    when(
        is_torch,
        "with the torch backend, which has one attention",
        "attention_backend flash_attention_version apply_query_key_layer_scaling",
        "Drop it, or pass --backend te on a GPU",
    ),
    never(UNREAD, "apply_residual_connection_post_layernorm onnx_safe"),
    never(UNREAD, "openai_gelu", "Drop it, or pass --no-bias-gelu-fusion"),
    never(
        "here: the loss is computed in fp32, and fused, without it",
        "cross_entropy_loss_fusion cross_entropy_fusion_impl fp16_lm_cross_entropy",
        "Drop it; --cross-entropy chunked takes less memory",
    ),
    when(lambda flags: is_cpu(flags) or is_te(flags), "without the torch backend on a GPU", "triton_kernels"),
    when(
        lambda flags: is_te(flags) and not flags["num_experts"],
        "in a dense model, whose norms are in TransformerEngine's linear layers",
        "fused_residual_rmsnorm",
    ),
    never(
        "here: no such layer is built",
        "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim cache_mla_latents mla_down_proj_fusion "
        "dsa_ linear_ mtp_ mamba_ use_mamba_mem_eff_path mrope_section relative_attention_ "
        "use_fused_weighted_squared_relu use_kitchen_attention kitchen_attention_backend bert_binary_head",
    ),
    never(
        "here: the rows of the vocabulary follow from --vocab-size",
        "vocab_extra_ids pad_vocab_size",
        "Pass a larger --vocab-size, or --make-vocab-size-divisible-by",
    ),
    never(
        # Counts and memory are computed from the derived size, with which another would disagree.
        "here: it follows from --vocab-size, --make-vocab-size-divisible-by and the tensor-parallel size",
        "padded_vocab_size",
        "Pass those instead",
    ),
    never("in megatron-core 0.19, whose models are all of that kind", "deprecated_use_mcore_models"),
    never("here: a model has one length", "encoder_seq_length decoder_seq_length", "Pass --seq-length"),
)

EXPERTS: tuple[Idle, ...] = (
    beside(
        "num_experts",
        "moe_ expert_tensor_parallel_size overlap_moe_expert_parallel_comm save_tokens_per_expert_interval "
        "overlap_dispatch_backward_with_experts_wgrad",
        " 8",
    ),
    beside(
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap moe_shared_expert_gate moe_shared_expert_glu_interleave_size "
        "use_grouped_gemm_for_shared_expert",
        " 1024",
    ),
    beside("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity moe_token_drop_policy", " 1.5"),
    beside("moe_router_num_groups", "moe_router_group_topk", " 4"),
    beside("moe_router_group_topk", "moe_router_num_groups", " 2"),
    when(
        lambda flags: flags["moe_router_score_function"] != "softmax",
        "with --moe-router-score-function sigmoid",
        "moe_router_pre_softmax",
    ),
    beside("moe_router_enable_expert_bias", "moe_router_bias_update_rate"),
    beside("moe_routing_trace_path", "moe_routing_trace_", " DIR"),
    beside("moe_paged_stash", "moe_paged_stash_"),
    when(
        lambda flags: flags["moe_token_dispatcher_type"] != "flex" and not flags["moe_enable_deepep"],
        "without --moe-token-dispatcher-type flex",
        "moe_flex_dispatcher_ moe_deepep_num_sms moe_hybridep_ moe_permute_fusion_into_hybridep moe_ncclep_",
        "Pass --moe-token-dispatcher-type flex with it, or drop it",
    ),
    beside(
        "overlap_moe_expert_parallel_comm",
        "ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream delay_wgrad_compute",
    ),
)
