"""The rows between Megatron's tensors and Hugging Face's, and the tensors of one model that they expand to.

A row is written on mcore's names with `{layer}` and `{expert}`, and serves both directions; each family has its own
(families/). `expand_rows` turns them into the tensors of a given model before anything is read, and
`validate_names_and_shapes` compares these with what is there, all at once.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from megatron_hammer.checkpoint.hugging_face.tensor_layouts import AS_IS, TensorLayout
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, MoeShape

Shape = tuple[int, ...]
# Rows of dense models do not use the symbols of experts, but every symbol needs a number.
_NO_EXPERTS = MoeShape(num_experts=0, router_topk=0, ffn_hidden_size=0)


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One Megatron tensor, its shape in the symbols of `_build_sizes`, and the HF tensors it becomes.

    layers: which layers have it, where it is a layer's. is_buffer: no parameter; fp32 in both formats, whatever the
    dtype of the weights.
    """

    megatron: str
    shape: str
    hf: tuple[str, ...]
    layout: TensorLayout = AS_IS
    layers: Literal["every", "dense", "mixture"] = "every"
    is_buffer: bool = False


def _expand_choices(name: str) -> tuple[str, ...]:
    """`<gate|up>_proj.weight` stands for two names."""
    if "|" not in name:
        return (name,)
    head, rest = name.split("<", 1)
    choices, tail = rest.split(">", 1)
    return tuple(f"{head}{choice}{tail}" for choice in choices.split("|"))


def build_rows(*lines: tuple[str, str, str] | tuple[str, str, str, TensorLayout]) -> tuple[TensorRow, ...]:
    """Rows of (Megatron's name, shape, Hugging Face's names, layout)."""
    return tuple(TensorRow(line[0], line[1], _expand_choices(line[2]), *line[3:]) for line in lines)


def mark_rows(rows: Sequence[TensorRow], **fields: Any) -> tuple[TensorRow, ...]:
    """The rows with these fields of `TensorRow`, such as the layers that have them."""
    return tuple(replace(row, **fields) for row in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPair:
    """One Megatron tensor and the HF tensors it becomes, with their names and shapes for one architecture."""

    megatron_name: str
    megatron_shape: Shape
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    layout: TensorLayout
    is_buffer: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.megatron_shape)


def expand_rows(rows: Sequence[TensorRow], model: ModelShape) -> list[TensorPair]:
    """Every tensor of the model, in the order of the rows, layer by layer."""
    sizes = _build_sizes(model)
    return [_expand_row(row, indices, model, sizes) for row, indices in _ordered(rows, model)]


def _build_sizes(model: ModelShape) -> dict[str, int]:
    """The symbols in which rows write shapes."""
    moe = model.moe or _NO_EXPERTS
    return {
        "h": model.hidden_size,
        "f": model.ffn_hidden_size,
        "2f": 2 * model.ffn_hidden_size,
        "q": model.num_attention_heads * model.head_dim,
        "qkv": (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
        # One norm weight is shared by all heads, so it has the width of a head.
        "d": model.head_dim,
        "v": model.vocab_size,
        "p": model.max_position_embeddings,
        "1": 1,
        "e": moe.num_experts,
        "m": moe.ffn_hidden_size,
        "2m": 2 * moe.ffn_hidden_size,
        "s": moe.shared_expert_intermediate_size,
        "2s": 2 * moe.shared_expert_intermediate_size,
    }


def _ordered(rows: Sequence[TensorRow], model: ModelShape) -> Iterator[tuple[TensorRow, dict[str, int]]]:
    """Rows outside the layers keep their place; the rows of a layer are repeated together."""
    for is_layer, group in itertools.groupby(_layers_together(rows), key=lambda row: "{layer}" in row.megatron):
        group_rows = list(group)
        for layer in range(model.num_layers if is_layer else 1):
            for row in group_rows:
                if is_layer and row.layers != "every" and (row.layers == "mixture") != model.is_mixture(layer):
                    continue
                # Rows of one expert are not grouped: all gates and ups of a layer come first, then all down
                # projections.
                num_experts = model.moe.num_experts if model.moe and "{expert}" in row.megatron else 1
                for expert in range(num_experts):
                    yield row, {"layer": layer, "expert": expert}


def _layers_together(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """The embeddings, then every row of a layer, then the final norm and the head."""
    in_layer = [row for row in rows if "{layer}" in row.megatron]
    before = [row for row in rows if row.megatron.startswith("embedding.")]
    after = [row for row in rows if row not in in_layer and row not in before]
    return before + in_layer + after


def _expand_row(row: TensorRow, indices: Mapping[str, int], model: ModelShape, sizes: Mapping[str, int]) -> TensorPair:
    shape = tuple(sizes[symbol] for symbol in row.shape.split())
    # The layout itself says which shapes come out. On the meta device that costs no memory.
    parts = row.layout.split(torch.empty(shape, device="meta"), model)
    return TensorPair(
        megatron_name=row.megatron.format(**indices),
        megatron_shape=shape,
        hf_names=tuple(name.format(**indices) for name in row.hf),
        hf_shapes=tuple(tuple(part.shape) for part in parts),
        layout=row.layout,
        is_buffer=row.is_buffer,
    )


def validate_names_and_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str) -> None:
    """Raise one ConversionError with a sentence for every tensor missing, unexpected or wrongly shaped in `where`."""
    missing = [
        f"{name}: the architecture needs it with shape {expected[name]}, got none in {where}. "
        "Check that the checkpoint is complete and its arguments are its own."
        for name in expected
        if name not in found
    ]
    # A tensor that no row names would be lost without a word, which is worse than an export that stops.
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
