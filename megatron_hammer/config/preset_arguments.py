"""A preset as Megatron's arguments: {attribute of Megatron's namespace: value}. Pure; no torch, no megatron."""

from typing import Any

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset, Recipe


def preset_arguments(preset: Preset) -> dict[str, Any]:
    """Everything that `--preset` sets; flags given on the command line are laid over it."""
    return {**model_arguments(preset.model), **recipe_arguments(preset.recipe)}


def model_arguments(model: ModelShape) -> dict[str, Any]:
    """Architecture. `position_embedding_type` and friends use Megatron's own values."""
    arguments: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "swiglu": model.activation == "swiglu",
        "add_bias_linear": model.has_linear_bias,
        "add_qkv_bias": model.has_qkv_bias or model.has_linear_bias,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "untie_embeddings_and_output_weights": not model.has_tied_embeddings,
        "embedding_norm": model.has_embedding_norm,
        "init_method_std": model.init_method_std,
        "qk_layernorm": model.has_qk_norm,
        "use_rope_scaling": model.rope_scaling is not None,
        "rotary_seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor,
    }
    if model.rope_scaling is not None:
        arguments["rope_scaling_factor"] = model.rope_scaling.factor
    if model.activation == "gelu_erf":
        arguments["bias_gelu_fusion"] = False
    if model.moe is not None:
        arguments |= {
            "num_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.router_topk,
            "moe_ffn_hidden_size": model.moe.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe.shared_expert_intermediate_size or None,
            "moe_router_pre_softmax": not model.moe.is_topk_renormalized,
            "moe_aux_loss_coeff": model.moe.aux_loss_coeff,
            "moe_shared_expert_gate": model.moe.has_shared_expert_gate,
            "moe_token_dispatcher_type": "alltoall",
        }
    return arguments


def recipe_arguments(recipe: Recipe) -> dict[str, Any]:
    """Batch, schedule, regularisation, precision and layout."""
    vp = recipe.virtual_pipeline_model_parallel_size
    return {
        "seq_length": recipe.seq_length,
        "micro_batch_size": recipe.micro_batch_size,
        "global_batch_size": recipe.global_batch_size,
        "train_iters": recipe.train_steps,
        "lr": recipe.lr,
        "min_lr": recipe.min_lr,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": recipe.lr_warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_eps": recipe.adam_eps,
        "clip_grad": recipe.clip_grad,
        "hidden_dropout": recipe.hidden_dropout,
        "attention_dropout": recipe.attention_dropout,
        "precision": recipe.precision,
        "tensor_model_parallel_size": recipe.tensor_model_parallel_size,
        "pipeline_model_parallel_size": recipe.pipeline_model_parallel_size,
        "num_virtual_stages_per_pipeline_rank": vp if vp > 1 else None,
        "expert_model_parallel_size": recipe.expert_model_parallel_size,
        "sequence_parallel": recipe.has_sequence_parallel,
    }
