"""The arguments of an old Megatron, completed with what it did before each argument existed.

`saved_model.py` reads today's names. A checkpoint of before megatron-core was written by one model class, the GPT of
`megatron/model`, whose choices were fixed where no flag is saved: LayerNorm, biases, learned positions, tied
embeddings.
"""

import copy
from typing import Any


def complete_arguments(args: Any) -> Any:
    """A copy of `args` with every argument that decides the model; what is saved is never changed."""
    completed = copy.copy(args)
    for name, value in _inferred(args).items():
        if getattr(args, name, None) is None:
            setattr(completed, name, value)
    return completed


def _inferred(args: Any) -> dict[str, Any]:
    """Source: megatron/arguments.py of Megatron-LM v1.1, v2.0 and v3.0, and its megatron/model."""
    is_rotary = getattr(args, "use_rotary_position_embeddings", False)
    has_position_embedding = getattr(args, "add_position_embedding", True)
    groups = getattr(args, "num_query_groups", None)
    tp = getattr(args, "model_parallel_size", 1)
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "ffn_hidden_size": 4 * args.hidden_size,
        "kv_channels": args.hidden_size // args.num_attention_heads,  # width of a head
        "group_query_attention": groups is not None and groups != args.num_attention_heads,
        "num_query_groups": args.num_attention_heads,
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": getattr(args, "apply_layernorm_1p", False),
        "position_embedding_type": "rope" if is_rotary else "learned_absolute" if has_position_embedding else "none",
        "rotary_base": 10_000,
        "rotary_percent": 1.0,
        "add_bias_linear": not getattr(args, "disable_bias_linear", False),
        "add_qkv_bias": False,
        "swiglu": False,
        "bias_gelu_fusion": False,
        "untie_embeddings_and_output_weights": False,
        "init_method_std": 0.02,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "seq_length": args.max_position_embeddings,
        # batch_size counted the samples per data-parallel rank, and there was no pipeline: world_size = tp * dp.
        "global_batch_size": getattr(args, "batch_size", 0) * max(1, getattr(args, "world_size", 1) // tp),
    }
