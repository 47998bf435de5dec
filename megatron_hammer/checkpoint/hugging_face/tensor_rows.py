"""The one table between Megatron's tensors and Hugging Face's, used in both directions.

A row is written on mcore's names with `{layer}` and `{expert}`; `expand` turns a family's rows into tensors of a given
architecture before anything is read, and `validate_names_and_shapes` compares them with what is there, all at once.
Another family is another tuple of rows and a line in `select_family`; `write_config.py` writes its config.json.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.saved_model import Architecture
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import merge_gate_up, merge_qkv, split_gate_up, split_qkv
from megatron_hammer.errors import ConversionError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A pair of exact inverses between one Megatron tensor and the HF tensors of its row."""

    split: Callable[[Tensor, Architecture], tuple[Tensor, ...]]
    merge: Callable[[Sequence[Tensor], Architecture], Tensor]


def _split_qkv(qkv: Tensor, model: Architecture) -> tuple[Tensor, ...]:
    return split_qkv(qkv, num_query_groups=model.num_query_groups, head_dim=model.head_dim)


def _merge_qkv(parts: Sequence[Tensor], model: Architecture) -> Tensor:
    query, key, value = parts
    return merge_qkv(query, key, value, num_query_groups=model.num_query_groups, head_dim=model.head_dim)


AS_IS = Layout(split=lambda tensor, _: (tensor,), merge=lambda parts, _: parts[0])
# GPT-2's Conv1D stores [in, out].
TRANSPOSED = Layout(
    split=lambda tensor, _: (tensor.t().contiguous(),), merge=lambda parts, _: parts[0].t().contiguous()
)
QKV = Layout(split=_split_qkv, merge=_merge_qkv)
# GPT-2's c_attn keeps q, k and v in one tensor, one after the other.
CONV1D_QKV_WEIGHT = Layout(
    split=lambda tensor, model: (torch.cat(_split_qkv(tensor, model)).t().contiguous(),),
    merge=lambda parts, model: _merge_qkv(parts[0].t().chunk(3), model),
)
CONV1D_QKV_BIAS = Layout(
    split=lambda tensor, model: (torch.cat(_split_qkv(tensor, model)),),
    merge=lambda parts, model: _merge_qkv(parts[0].chunk(3), model),
)
GATE_UP = Layout(split=lambda tensor, _: split_gate_up(tensor), merge=lambda parts, _: merge_gate_up(*parts))


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron tensor, its shape in the symbols of `Architecture.dims`, and the HF tensors it becomes."""

    megatron: str
    shape: str
    hf: tuple[str, ...]
    layout: Layout = AS_IS


def _expand_choices(name: str) -> tuple[str, ...]:
    """`<gate|up>_proj.weight` stands for two names."""
    if "|" not in name:
        return (name,)
    head, rest = name.split("<", 1)
    choices, tail = rest.split(">", 1)
    return tuple(f"{head}{choice}{tail}" for choice in choices.split("|"))


def _rows(*lines: tuple[str, str, str] | tuple[str, str, str, Layout]) -> tuple[Row, ...]:
    return tuple(Row(line[0], line[1], _expand_choices(line[2]), *line[3:]) for line in lines)


_LAYER, _HF_LAYER, _GPT2_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}.", "transformer.h.{layer}."

LLAMA_BODY = _rows(
    ("embedding.word_embeddings.weight", "v h", "model.embed_tokens.weight"),
    (_LAYER + "self_attention.linear_qkv.layer_norm_weight", "h", _HF_LAYER + "input_layernorm.weight"),
    (_LAYER + "self_attention.linear_qkv.weight", "qkv h", _HF_LAYER + "self_attn.<q|k|v>_proj.weight", QKV),
    (_LAYER + "self_attention.linear_proj.weight", "h q", _HF_LAYER + "self_attn.o_proj.weight"),
    ("decoder.final_layernorm.weight", "h", "model.norm.weight"),
)
LLAMA_QKV_BIAS = _rows(
    (_LAYER + "self_attention.linear_qkv.bias", "qkv", _HF_LAYER + "self_attn.<q|k|v>_proj.bias", QKV),
)
QK_NORM = _rows(
    (_LAYER + "self_attention.q_layernorm.weight", "d", _HF_LAYER + "self_attn.q_norm.weight"),
    (_LAYER + "self_attention.k_layernorm.weight", "d", _HF_LAYER + "self_attn.k_norm.weight"),
)
LLAMA_MLP = _rows(
    (_LAYER + "mlp.linear_fc1.layer_norm_weight", "h", _HF_LAYER + "post_attention_layernorm.weight"),
    (_LAYER + "mlp.linear_fc1.weight", "2f h", _HF_LAYER + "mlp.<gate|up>_proj.weight", GATE_UP),
    (_LAYER + "mlp.linear_fc2.weight", "h f", _HF_LAYER + "mlp.down_proj.weight"),
)
LLAMA_LINEAR_BIAS = _rows(
    (_LAYER + "self_attention.linear_proj.bias", "h", _HF_LAYER + "self_attn.o_proj.bias"),
    (_LAYER + "mlp.linear_fc1.bias", "2f", _HF_LAYER + "mlp.<gate|up>_proj.bias", GATE_UP),
    (_LAYER + "mlp.linear_fc2.bias", "h", _HF_LAYER + "mlp.down_proj.bias"),
)
LLAMA_HEAD = _rows(("output_layer.weight", "v h", "lm_head.weight"))

_EXPERT, _HF_EXPERT = _LAYER + "mlp.experts.experts.{expert}.", _HF_LAYER + "mlp.experts.{expert}."
_SHARED, _HF_SHARED = _LAYER + "mlp.shared_experts.", _HF_LAYER + "mlp.shared_expert"
QWEN_EXPERTS = _rows(
    (_LAYER + "pre_mlp_layernorm.weight", "h", _HF_LAYER + "post_attention_layernorm.weight"),
    (_LAYER + "mlp.router.weight", "e h", _HF_LAYER + "mlp.gate.weight"),
    (_EXPERT + "linear_fc1.weight", "2m h", _HF_EXPERT + "<gate|up>_proj.weight", GATE_UP),
    (_EXPERT + "linear_fc2.weight", "h m", _HF_EXPERT + "down_proj.weight"),
)
QWEN_SHARED_EXPERT = _rows(
    (_SHARED + "linear_fc1.weight", "2s h", _HF_SHARED + ".<gate|up>_proj.weight", GATE_UP),
    (_SHARED + "linear_fc2.weight", "h s", _HF_SHARED + ".down_proj.weight"),
    (_SHARED + "gate_weight", "1 h", _HF_SHARED + "_gate.weight"),
)
_MIXTRAL = _HF_LAYER + "block_sparse_moe."
MIXTRAL_EXPERTS = _rows(
    (_LAYER + "pre_mlp_layernorm.weight", "h", _HF_LAYER + "post_attention_layernorm.weight"),
    (_LAYER + "mlp.router.weight", "e h", _MIXTRAL + "gate.weight"),
    (_EXPERT + "linear_fc1.weight", "2m h", _MIXTRAL + "experts.{expert}.<w1|w3>.weight", GATE_UP),
    (_EXPERT + "linear_fc2.weight", "h m", _MIXTRAL + "experts.{expert}.w2.weight"),
)

GPT2 = _rows(
    ("embedding.word_embeddings.weight", "v h", "transformer.wte.weight"),
    ("embedding.position_embeddings.weight", "p h", "transformer.wpe.weight"),
    (_LAYER + "self_attention.linear_qkv.layer_norm_weight", "h", _GPT2_LAYER + "ln_1.weight"),
    (_LAYER + "self_attention.linear_qkv.layer_norm_bias", "h", _GPT2_LAYER + "ln_1.bias"),
    (_LAYER + "self_attention.linear_qkv.weight", "qkv h", _GPT2_LAYER + "attn.c_attn.weight", CONV1D_QKV_WEIGHT),
    (_LAYER + "self_attention.linear_qkv.bias", "qkv", _GPT2_LAYER + "attn.c_attn.bias", CONV1D_QKV_BIAS),
    (_LAYER + "self_attention.linear_proj.weight", "h q", _GPT2_LAYER + "attn.c_proj.weight", TRANSPOSED),
    (_LAYER + "self_attention.linear_proj.bias", "h", _GPT2_LAYER + "attn.c_proj.bias"),
    (_LAYER + "mlp.linear_fc1.layer_norm_weight", "h", _GPT2_LAYER + "ln_2.weight"),
    (_LAYER + "mlp.linear_fc1.layer_norm_bias", "h", _GPT2_LAYER + "ln_2.bias"),
    (_LAYER + "mlp.linear_fc1.weight", "f h", _GPT2_LAYER + "mlp.c_fc.weight", TRANSPOSED),
    (_LAYER + "mlp.linear_fc1.bias", "f", _GPT2_LAYER + "mlp.c_fc.bias"),
    (_LAYER + "mlp.linear_fc2.weight", "h f", _GPT2_LAYER + "mlp.c_proj.weight", TRANSPOSED),
    (_LAYER + "mlp.linear_fc2.bias", "h", _GPT2_LAYER + "mlp.c_proj.bias"),
    ("decoder.final_layernorm.weight", "h", "transformer.ln_f.weight"),
    ("decoder.final_layernorm.bias", "h", "transformer.ln_f.bias"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A class of transformers and the rows that fill it."""

    name: str  # transformers' model_type
    hf_class: str
    rows: tuple[Row, ...]


def select_family(model: Architecture) -> Family:
    """The class of transformers that computes this architecture; raises ConversionError where there is none."""
    head = () if model.has_tied_embeddings else LLAMA_HEAD
    if model.has_embedding_norm:
        raise _no_family("embedding_norm=True", "transformers has no Open-Llama class any more")
    if model.normalization == "LayerNorm":
        _require_gpt2(model)
        return Family(name="gpt2", hf_class="GPT2LMHeadModel", rows=GPT2 + head)
    _require_llama_body(model)
    name, hf_class, rows = _select_dense(model) if model.moe is None else _select_mixture(model)
    return Family(name=name, hf_class=hf_class, rows=LLAMA_BODY + rows + head)


def _select_dense(model: Architecture) -> tuple[str, str, tuple[Row, ...]]:
    """model_type, class, and the rows that it adds to Llama's body."""
    if model.has_qk_norm:
        if model.has_qkv_bias:
            raise _no_family("qk_layernorm=True with a bias", "Qwen3 has none, or one on o_proj too")
        return "qwen3", "Qwen3ForCausalLM", QK_NORM + LLAMA_MLP
    has_whole_heads = model.hidden_size % model.num_attention_heads == 0  # LlamaConfig asks for it
    if model.has_linear_bias:  # attention_bias and mlp_bias of LlamaConfig
        if not has_whole_heads:
            raise _no_family(f"kv_channels={model.head_dim} with biases", "Llama's heads must divide hidden_size")
        return "llama", "LlamaForCausalLM", LLAMA_QKV_BIAS + LLAMA_MLP + LLAMA_LINEAR_BIAS
    if model.has_qkv_bias:  # LlamaConfig's attention_bias would bias o_proj too
        return "qwen2", "Qwen2ForCausalLM", LLAMA_QKV_BIAS + LLAMA_MLP
    if not has_whole_heads:
        return "mistral", "MistralForCausalLM", LLAMA_MLP
    return "llama", "LlamaForCausalLM", LLAMA_MLP


def _select_mixture(model: Architecture) -> tuple[str, str, tuple[Row, ...]]:
    moe = model.moe
    assert moe is not None
    if model.has_linear_bias:
        raise _no_family("experts with add_bias_linear=True", "no class with experts biases more than q, k and v")
    if moe.shared_expert_intermediate_size:
        if not moe.has_shared_expert_gate:
            raise _no_family("a shared expert without its gate", "Qwen2-MoE, which has one, scales it by a gate")
        if model.has_qk_norm:
            raise _no_family("qk_layernorm=True with a shared expert", "Qwen3-MoE has none and Qwen2-MoE no such norm")
        bias = LLAMA_QKV_BIAS if model.has_qkv_bias else ()
        return "qwen2_moe", "Qwen2MoeForCausalLM", bias + QWEN_EXPERTS + QWEN_SHARED_EXPERT
    if model.has_qkv_bias:
        raise _no_family("experts with a QKV bias and no shared expert", "only Qwen2-MoE, which has one, biases them")
    if model.has_qk_norm:
        return "qwen3_moe", "Qwen3MoeForCausalLM", QK_NORM + QWEN_EXPERTS
    if not moe.is_topk_renormalized:
        raise _no_family(
            "experts with moe_router_pre_softmax=True, no shared one and no norm on queries and keys",
            "Mixtral's weights of the chosen experts sum to one",
        )
    return "mixtral", "MixtralForCausalLM", MIXTRAL_EXPERTS


def _no_family(value: str, reason: str) -> ConversionError:
    return ConversionError(
        f"architecture: a class of transformers must compute it, got {value}: {reason}. "
        "Keep the checkpoint in Megatron's format."
    )


def _require_gpt2(model: Architecture) -> None:
    if model.position_embedding_type != "learned_absolute":
        raise _no_family("normalization=LayerNorm with rope", "only GPT-2, with learned positions, is mapped")
    if model.activation == "swiglu" or model.moe is not None:
        raise _no_family("normalization=LayerNorm with a gated MLP or experts", "GPT-2's MLP is plain gelu")
    if not model.has_linear_bias:
        raise _no_family("normalization=LayerNorm without biases", "every linear layer of GPT-2 has one")
    if model.num_query_groups != model.num_attention_heads:
        raise _no_family(f"num_query_groups={model.num_query_groups}", "GPT-2 has multi-head attention only")
    if model.has_qk_norm:
        raise _no_family("normalization=LayerNorm with qk_layernorm=True", "GPT-2 has no norm on queries and keys")
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        raise _no_family(f"kv_channels={model.head_dim}", "GPT-2's heads fill hidden_size exactly")


def _require_llama_body(model: Architecture) -> None:
    if model.position_embedding_type != "rope":
        raise _no_family("normalization=RMSNorm with learned positions", "Llama rotates queries and keys")
    if model.activation != "swiglu":
        raise _no_family(f"normalization=RMSNorm with activation={model.activation}", "Llama's MLP is swiglu")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPair:
    """One Megatron tensor and the HF tensors it becomes, with their names and shapes for one architecture."""

    megatron_name: str
    megatron_shape: Shape
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    layout: Layout


def expand(family: Family, model: Architecture) -> list[TensorPair]:
    """Every tensor of the model, in the order of the rows, layer by layer."""
    return [_expand_row(row, indices, model) for row, indices in _ordered(family.rows, model)]


def _ordered(rows: Sequence[Row], model: Architecture) -> Iterator[tuple[Row, dict[str, int]]]:
    """Rows outside the layers keep their place; the rows of a layer are repeated together."""
    for is_layer, group in itertools.groupby(_layers_together(rows), key=lambda row: "{layer}" in row.megatron):
        group_rows = list(group)
        for layer in range(model.num_layers if is_layer else 1):
            for row in group_rows:
                num_experts = model.dims["e"] if "{expert}" in row.megatron else 1
                for expert in range(num_experts):
                    yield row, {"layer": layer, "expert": expert}


def _layers_together(rows: Sequence[Row]) -> list[Row]:
    """The embeddings, then every row of a layer, then the final norm and the head."""
    in_layer = [row for row in rows if "{layer}" in row.megatron]
    before = [row for row in rows if row.megatron.startswith("embedding.")]
    after = [row for row in rows if row not in in_layer and row not in before]
    return before + in_layer + after


def _expand_row(row: Row, indices: Mapping[str, int], model: Architecture) -> TensorPair:
    shape = tuple(model.dims[symbol] for symbol in row.shape.split())
    parts = row.layout.split(torch.empty(shape, device="meta"), model)
    return TensorPair(
        megatron_name=row.megatron.format(**indices),
        megatron_shape=shape,
        hf_names=tuple(name.format(**indices) for name in row.hf),
        hf_shapes=tuple(tuple(part.shape) for part in parts),
        layout=row.layout,
    )


def validate_names_and_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str) -> None:
    """Raise one ConversionError with a sentence for every tensor missing, unexpected or wrongly shaped in `where`."""
    missing = [
        f"{name}: the architecture needs it with shape {expected[name]}, got none in {where}. "
        "Check that the checkpoint is complete and its arguments are its own."
        for name in expected
        if name not in found
    ]
    unexpected = [
        f"{name}: nothing maps it, got a tensor of shape {found[name]} in {where}. "
        "It would be lost; check that the checkpoint's arguments are its own."
        for name in found
        if name not in expected
    ]
    misshapen = [
        f"{name}: expected shape {expected[name]}, got {found[name]} in {where}. Check the architecture's arguments."
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if missing or unexpected or misshapen:
        raise ConversionError(*missing, *unexpected, *misshapen)
