"""Names in a legacy checkpoint of any age become mcore's, in the spelling that `tensor_rows.py` is written on.

Before megatron-core a state dict was nested (`language_model`, `encoder`, and `transformer` before that) and spelled
layers otherwise; megatron-core's are flat. Layers and experts are counted within their rank: reader.py adds the
offsets.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Where the head of a tied model keeps its own copy of the embedding on the last pipeline stage.
TIED_HEAD = "output_layer.weight"

_OLD_NAMES: tuple[tuple[str, str], ...] = (
    (r"language_model\.embedding\.(word|position)_embeddings\.weight", r"embedding.\1_embeddings.weight"),
    (r"(language_model\.output_layer|word_embeddings_for_head|word_embeddings)\.weight", TIED_HEAD),
    (r"language_model\.(?:encoder|transformer)\.(?:final_layernorm|final_norm)\.", "decoder.final_layernorm."),
    (r"language_model\.(?:encoder|transformer)\.layers\.(\d+)\.", r"decoder.layers.\1."),
)
_OLD_PARTS: tuple[tuple[str, str], ...] = (
    (r"(?:self_)?attention\.query_key_value\.", "self_attention.linear_qkv."),
    (r"(?:self_)?attention\.dense\.", "self_attention.linear_proj."),
    (r"mlp\.dense_h_to_4h\.", "mlp.linear_fc1."),
    (r"mlp\.dense_4h_to_h\.", "mlp.linear_fc2."),
    (r"input_norm\.", "input_layernorm."),
    (r"post_attention_(?:layer)?norm\.", "pre_mlp_layernorm."),
)
_EXPERT_NAMES: tuple[tuple[str, str], ...] = (
    # SequentialMLP numbers its modules; TEGroupedMLP numbers the weights of one module.
    (r"mlp\.experts\.local_experts\.(\d+)\.", r"mlp.experts.experts.\1."),
    (r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r"mlp.experts.experts.\3.\1.\2"),
)
# Not part of a model: TransformerEngine's fp8 state, and frequencies that are computed from rotary_base.
_DERIVED = re.compile(r"(^|\.)(_extra_state\d*|rotary_pos_emb\.inv_freq)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.")


def flatten_state(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of a state dict that may be nested, with its dotted name; without what is derived from the rest."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten_state(value, f"{name}.")
        elif not _DERIVED.search(name):
            yield name, value


def translate_name(name: str) -> str:
    """mcore's name, layers and experts counted as in the file; a name of neither spelling stays as it is."""
    name = name.removeprefix("module.")
    for pattern, replacement in _OLD_NAMES:
        name, num_found = re.subn(f"^{pattern}", replacement, name)
        if num_found:
            break
    if layer := _LAYER.match(name):
        name = layer[0] + _translate_part(name[layer.end() :])
    for pattern, replacement in _EXPERT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _translate_part(part: str) -> str:
    for pattern, replacement in _OLD_PARTS:
        translated, num_found = re.subn(f"^{pattern}", replacement, part)
        if num_found:
            return translated
    return part


def select_layer(name: str) -> int | None:
    """The layer in an mcore name, if it is a layer's."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def select_expert(name: str) -> int | None:
    """The expert in an mcore name, if it is a routed expert's."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def shift_name(name: str, *, num_layers: int, num_experts: int) -> str:
    """The name with its layer and expert numbers raised by the given counts."""
    if (layer := select_layer(name)) is not None:
        name = _LAYER.sub(f"decoder.layers.{layer + num_layers}.", name)
    if (expert := select_expert(name)) is not None:
        name = _EXPERT.sub(f".mlp.experts.experts.{expert + num_experts}.", name)
    return name
