"""The saved arguments of a checkpoint that was made from a Hugging Face folder.

They hold what is known of the model: `read_saved_model` reads the same model from them, Megatron's
`--use-checkpoint-args` finds the model's flags, and its loader finds what it compares. There is no recipe, because no
step was trained. The vocabulary is not padded and padded_vocab_size is left out, so each run pads for its own
tensor-parallel size.
"""

import argparse
from typing import Any

import torch

from megatron_hammer.checkpoint.hugging_face.config_json import HfModel
from megatron_hammer.checkpoint_files.saved_arguments import TOKENIZER_HASH
from megatron_hammer.config.model_arguments import build_model_arguments

CHECKPOINT_VERSION = 3.0  # since Megatron-LM 3.0, in which the rows of QKV have their present order
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Megatron's defaults, which every mapped model has. Source: megatron.training.arguments 0.19.2,
# load_args_from_checkpoint and check_checkpoint_args of megatron.training.checkpointing.
_SHARED: dict[str, Any] = {
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "rotary_scaling_factor": 1.0,
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "squared_relu": False,
    "openai_gelu": False,
    "multi_latent_attention": False,
    "make_vocab_size_divisible_by": 128,
    "spec": None,
    "hybrid_layer_pattern": None,
    "mtp_num_layers": None,
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_dtype": None,
    "moe_aux_loss_coeff": 0.0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "world_size": 1,
    "data_parallel_size": 1,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
    "iteration": 0,
    "preset": None,
    "ckpt_format": "torch_dist",
    "async_save": False,
    # The checkpoint has neither an optimizer nor a random state to load.
    "no_save_optim": True,
    "no_save_rng": True,
}


def build_saved_arguments(
    model: HfModel,
    *,
    dtype: torch.dtype,
    imported_from: str,
    tokenizer_model: str | None,
    tokenizer_sha256: str | None = None,
) -> argparse.Namespace:
    """Megatron's namespace for `model`; dtype: of most weights. imported_from: the name of the folder, for humans."""
    precision = PRECISIONS[dtype]
    return argparse.Namespace(
        **{
            # The defaults first: what the model says replaces them.
            **_SHARED,
            **build_model_arguments(model.shape),
            # config.json does not say at which length the model was trained. The positions are the most that it allows.
            "seq_length": model.shape.max_position_embeddings,
            # Megatron's fused kernel computes the tanh form of gelu, the plain one the exact form.
            "bias_gelu_fusion": model.shape.activation == "gelu_tanh",
            "bias_swiglu_fusion": True,
            "hidden_dropout": model.dropout.hidden,
            "attention_dropout": model.dropout.attention,
            "precision": precision,
            "bf16": precision == "bf16",
            "fp16": precision == "fp16",
            "params_dtype": dtype,
            "tokenizer_model": tokenizer_model,
            TOKENIZER_HASH: tokenizer_sha256,
            # NullTokenizer is megatron's type that needs no file.
            "tokenizer_type": "NullTokenizer" if tokenizer_model is None else "HuggingFaceTokenizer",
            "imported_from": imported_from,
        }
    )


def build_common_state(arguments: argparse.Namespace) -> dict[str, Any]:
    """What Megatron's loader needs beside the weights, for a model before its first step."""
    return {
        "args": arguments,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        # singleton_local_shards false: experts lie along an axis, not under numbers (SequentialMLP.sharded_state_dict).
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
