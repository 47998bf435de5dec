"""What multi-latent attention keeps for its backward pass: the tensors that autograd holds on to, each storage once."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.options import MemoryOptions
from megatron_hammer.model.shape import LatentAttention
from megatron_hammer.model.torch_modules import TorchNorm
from tests.helpers.layer_activations import count_layer_activation_bytes
from tests.helpers.toy_model import LLAMA
from tests.helpers.whole_model import single_rank

TOKENS, HEADS, HIDDEN, FFN = 29, 4, 36, 52
LATENT = LatentAttention(q_lora_rank=20, kv_lora_rank=28, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=14)
MODEL = dataclasses.replace(
    LLAMA,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=HEADS,
    num_query_groups=HEADS,
    kv_channels=None,
    latent_attention=LATENT,
    has_qk_norm=True,
)


class _KeepingAttention(torch.autograd.Function):
    """Keeps what flash attention keeps, except a number per row: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = value.clone()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError


class CoreAttention(torch.nn.Module):
    def __init__(self, **_: Any):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _KeepingAttention.apply(query, key, value).flatten(2)


def build_attention(latent: LatentAttention, *, recomputes: bool) -> torch.nn.Module:
    has_norms = latent.q_lora_rank is not None
    selective = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]} if recomputes else {}
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        multi_latent_attention=True,
        rope_type="rope",
        qk_layernorm=has_norms,
        normalization="LayerNorm",  # torch's RMSNorm keeps its normed input too, which no kernel for GPUs does
        add_bias_linear=False,
        use_cpu_initialization=True,
        **dataclasses.asdict(latent),
        **selective,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=has_norms, multi_latent_attention=True).submodules.self_attention
    spec.submodules.core_attention = CoreAttention
    if has_norms:
        spec.submodules.q_layernorm = spec.submodules.kv_layernorm = TorchNorm
    return build_module(spec, config=config, layer_number=1)


def count_kept(attention: torch.nn.Module) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in attention.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def remember(tensor: Tensor) -> Tensor:
        # Sines and cosines [s, 1, 1, d] are the whole model's; a norm keeps one number per token.
        is_state = tensor.dim() > 2 and tensor.shape[1:3] != (1, 1) and tensor.shape[-1] > 1
        if is_state and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hidden = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output, _ = attention(hidden, None)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())  # now: recomputation empties some of them


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_latent_attention_keeps_what_the_memory_model_counts(q_lora_rank, recomputes):
    latent = dataclasses.replace(LATENT, q_lora_rank=q_lora_rank)
    model = dataclasses.replace(MODEL, latent_attention=latent, has_qk_norm=q_lora_rank is not None)
    with single_rank():
        kept = count_kept(build_attention(latent, recomputes=recomputes))
    options = MemoryOptions(
        precision="fp32", recompute="selective" if recomputes else "none", recompute_modules=("mla_up_proj",)
    )
    layer = count_layer_activation_bytes(model, ParallelLayout(), num_tokens=TOKENS, options=options)
    # Of the layer, without the two norms' inputs, the MLP, and the number that attention keeps for each row and head.
    rest = 2 * HIDDEN + HIDDEN + 3 * FFN + HEADS
    # megatron.core's norms are modules of their own, whose outputs are the recomputed part's inputs.
    ranks = q_lora_rank + LATENT.kv_lora_rank if recomputes and q_lora_rank is not None else 0
    assert kept == layer + 4 * TOKENS * (ranks - rest)
