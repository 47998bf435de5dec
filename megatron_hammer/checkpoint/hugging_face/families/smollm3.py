"""SmolLM3: a Llama some of whose layers have no position embedding at all."""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, Dropout
from megatron_hammer.checkpoint.hugging_face.families.llama import (
    BIASES,
    LLAMA_REQUIREMENTS,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.checkpoint.hugging_face.window_rows import LAYER_TYPES, WINDOW, switched_window_in_chosen_layers
from megatron_hammer.model.shape import ModelShape


def _read_layers(fields: HfFields) -> Mapping[str, Any]:
    return {"layers_without_rope": fields.layers_without_rope(fields.count("num_hidden_layers"))}


def _write_layers(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    return {"no_rope_layers": [int(layer not in model.layers_without_rope) for layer in range(model.num_layers)]}


SMOLLM3 = Family(
    model_type="smollm3",
    hf_classes=("SmolLM3ForCausalLM",),
    is_tied_by_default=True,
    config=(
        *llama_config(default_rope_theta=2e6),
        BIASES,
        ConfigRow(_read_layers, _write_layers),
        # Without layer_types, the layers without a rope have the window.
        switched_window_in_chosen_layers(lambda fields: _read_layers(fields)["layers_without_rope"], default=None),
    ),
    features=WINDOW | {"layers_without_rope"},
    own_fields=LAYER_TYPES | {"no_rope_layers", "no_rope_layer_interval"},
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: model.has_linear_bias or not model.has_qkv_bias,
    requirements=LLAMA_REQUIREMENTS,
)
