"""Sliding windows in config.json: rows for families that have one in every layer, and for those that choose layers.

`sliding_window` counts the tokens that a position sees, itself among them, as `SlidingWindow.num_tokens` does
(transformers.masking_utils.sliding_window_overlay). Megatron's --window-size counts those before it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, Dropout
from megatron_hammer.checkpoint.hugging_face.family import Requirement
from megatron_hammer.model.shape import ModelShape, SlidingWindow

WINDOW = frozenset({"sliding_window"})  # Family.features of a class with a window
LAYER_TYPES = frozenset({"layer_types"})  # Family.own_fields of one that chooses layers
IN_EVERY_LAYER = Requirement(
    lambda model: model.sliding_window is None or len(model.sliding_window.layers) == model.num_layers,
    "a sliding window in some layers",
    "the class has one in every layer",
)
# The layers, from 0, that have a window where the file has no layer_types, by the config of the class.
DefaultLayers = Callable[[HfFields], Iterable[int]]


def _every_layer(fields: HfFields) -> Iterable[int]:
    return range(fields.count("num_hidden_layers"))


def window_in_every_layer(*, default: int | None) -> ConfigRow:
    """`sliding_window`, null for full attention. default: of the class, for an absent field."""

    def read(fields: HfFields) -> Mapping[str, Any]:
        return _describe(fields.window(default), _every_layer(fields))

    return ConfigRow(read, lambda model, _: {"sliding_window": _count_tokens(model)})


def switched_window_in_every_layer() -> ConfigRow:
    """Read only with `use_sliding_window`, and then in every layer, whatever max_window_layers says (Qwen3-MoE)."""

    def read(fields: HfFields) -> Mapping[str, Any]:
        is_on = fields.flag("use_sliding_window", False)
        return _describe(fields.window(4096) if is_on else None, _every_layer(fields))

    def write(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
        if model.sliding_window is None:
            return {"use_sliding_window": False}
        return {"use_sliding_window": True, "sliding_window": model.sliding_window.num_tokens}

    return ConfigRow(read, write)


def window_in_chosen_layers(default_layers: DefaultLayers = _every_layer, *, default: int | None) -> ConfigRow:
    """`layer_types` chooses, by default every layer; a null `sliding_window` switches off (Ministral, dots.llm1)."""

    def read(fields: HfFields) -> Mapping[str, Any]:
        return _read_chosen(fields, default, default_layers)

    def write(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
        return {"sliding_window": _count_tokens(model), "layer_types": _list_types(model)}

    return ConfigRow(read, write)


def switched_window_in_chosen_layers(default_layers: DefaultLayers, *, default: int | None) -> ConfigRow:
    """`use_sliding_window` switches, `layer_types` chooses (Qwen2, Qwen3, SmolLM3)."""

    def read(fields: HfFields) -> Mapping[str, Any]:
        return _read_chosen(fields, default, default_layers, is_on=fields.flag("use_sliding_window", False))

    def write(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
        window = model.sliding_window
        if window is None:
            return {"use_sliding_window": False}
        return {
            "use_sliding_window": True,
            "sliding_window": window.num_tokens,
            "max_window_layers": window.layers[0],  # what transformers 4 reads of Qwen; layer_types goes first
            "layer_types": _list_types(model),
        }

    return ConfigRow(read, write)


def last_layers(fields: HfFields) -> Iterable[int]:
    """Those from max_window_layers on."""
    return range(fields.count_or_zero("max_window_layers", 28), fields.count("num_hidden_layers"))


def _read_chosen(
    fields: HfFields, default: int | None, default_layers: DefaultLayers, *, is_on: bool = True
) -> Mapping[str, Any]:
    is_on = is_on and fields.has_value("sliding_window", default)
    layers = fields.windowed_layers(default_layers(fields) if is_on else ())
    if layers and not is_on:
        fields.refuse("layer_types", "the window of these layers is switched off")
    return _describe(fields.window(default) if is_on else None, layers)


def _describe(window: int | None, layers: Iterable[int]) -> Mapping[str, Any]:
    chosen = tuple(layers)
    has_one = window is not None and chosen
    return {"sliding_window": SlidingWindow(num_tokens=window or 0, layers=chosen) if has_one else None}


def _count_tokens(model: ModelShape) -> int | None:
    return None if model.sliding_window is None else model.sliding_window.num_tokens


def _list_types(model: ModelShape) -> list[str]:
    windowed = () if model.sliding_window is None else model.sliding_window.layers
    return ["sliding_attention" if layer in windowed else "full_attention" for layer in range(model.num_layers)]
