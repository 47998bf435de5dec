"""The toy model of the tests: one small Llama and its variants, as shapes, as Megatron's saved arguments, as weights.

No two dimensions of a tensor are alike where the architecture allows it, so that a swapped axis cannot pass. Shapes and
arguments are both spelt by hand; tests/unit/config/test_model_arguments.py holds one to the other.
"""

import dataclasses
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.model.shape import ModelShape, MoeShape
from tests.helpers.hf_by_hand import list_shapes, permute_to_megatron, write_config

LLAMA = ModelShape(
    name="toy-llama",
    source="the tests",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=53,
    max_position_embeddings=32,
)
PADDED_VOCAB_SIZE = 64
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
GPT2 = dataclasses.replace(
    LLAMA,
    num_query_groups=LLAMA.num_attention_heads,
    normalization="LayerNorm",
    activation="gelu_tanh",
    position_embedding_type="learned_absolute",
    has_linear_bias=True,
    has_qkv_bias=True,
    has_tied_embeddings=True,
)
# transformers' grouped matrix product wants rows of a multiple of 16 bytes: 12 numbers of fp32.
EXPERTS = MoeShape(num_experts=5, router_topk=2, ffn_hidden_size=12, is_topk_renormalized=True)
GATED_EXPERTS = dataclasses.replace(EXPERTS, shared_expert_intermediate_size=9, has_shared_expert_gate=True)
MOE = dataclasses.replace(LLAMA, moe=GATED_EXPERTS)

TOY_ARGUMENTS = {
    "num_layers": LLAMA.num_layers,
    "hidden_size": LLAMA.hidden_size,
    "ffn_hidden_size": LLAMA.ffn_hidden_size,
    "num_attention_heads": LLAMA.num_attention_heads,
    "group_query_attention": True,
    "num_query_groups": LLAMA.num_query_groups,
    "kv_channels": LLAMA.head_dim,
    "vocab_size": LLAMA.vocab_size,
    "padded_vocab_size": PADDED_VOCAB_SIZE,
    "max_position_embeddings": LLAMA.max_position_embeddings,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "bias_gelu_fusion": False,
    "position_embedding_type": "rope",
    "rotary_base": 10_000,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "embedding_norm": False,
    "init_method_std": 0.02,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "num_experts": None,
    "tokenizer_model": None,
    "preset": "toy",
    "seq_length": 16,
    "global_batch_size": 8,
    "consumed_train_samples": 80,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "lr_decay_style": "cosine",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "seed": 1234,
}
# What the variants change in TOY_ARGUMENTS.
GPT2_ARGUMENTS = {
    "group_query_attention": False,
    "normalization": "LayerNorm",
    "swiglu": False,
    "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
}
MOE_ARGUMENTS = {
    "num_experts": GATED_EXPERTS.num_experts,
    "moe_layer_freq": 1,
    "moe_router_topk": GATED_EXPERTS.router_topk,
    "moe_ffn_hidden_size": GATED_EXPERTS.ffn_hidden_size,
    "moe_shared_expert_intermediate_size": GATED_EXPERTS.shared_expert_intermediate_size,
    "moe_shared_expert_gate": True,
    "moe_aux_loss_coeff": 0.01,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
}
PLAIN_MOE_ARGUMENTS = MOE_ARGUMENTS | {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}


def toy_arguments(**changes: Any) -> Namespace:
    return Namespace(**(TOY_ARGUMENTS | changes))


def draw_weights(
    arguments: Namespace | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Tensor]:
    """Random weights by mcore name, the vocabulary padded; arguments: those of the model, by default the Llama's."""
    arguments = arguments or toy_arguments()
    config = write_config(arguments)
    unfilled = {name: torch.empty(shape, device="meta") for name, shape in list_shapes(config).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in permute_to_megatron(config, unfilled).items()}
    for name in shapes.keys() & set(VOCABULARY):
        shapes[name] = (arguments.padded_vocab_size, shapes[name][1])
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def stack_layers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the keys of torch_dist: one tensor for all layers, and for all experts in them."""
    for number in (r"(\.experts\.experts)\.\d+", r"(decoder\.layers)\.\d+"):
        groups: dict[str, list[Tensor]] = {}
        for name, tensor in weights.items():
            groups.setdefault(re.sub(number, r"\1", name), []).append(tensor)
        weights = {key: torch.stack(parts) if key not in weights else parts[0] for key, parts in groups.items()}
    return dict(weights)
