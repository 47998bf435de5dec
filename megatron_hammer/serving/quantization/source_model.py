"""The model that is to be quantized: which of its layers, and everything that stands in the way, found beforehand.

AutoRound leaves out layers whose shapes do not suit it, with a warning. Here they are refused by name, because a model
of which some layers are not quantized is larger and slower than was asked for.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, HfModel, read_config, read_hf_model
from megatron_hammer.checkpoint_files.safetensors.weight_files import HfWeights, open_hf_weights
from megatron_hammer.errors import ConversionError

# Weights of linear layers inside the blocks. Embeddings, the head and the norms are not among them: they stay fp16.
_BLOCK_LAYER = re.compile(r"model\.layers\.\d+\..*\.weight")
# What AutoRound and the kernels ask of both sizes of a layer.
SIZE_MULTIPLE = 32
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizableModel:
    """A Hugging Face folder with plain weights. layers: the names of the linear layers that are quantized."""

    folder: Path
    model: HfModel
    weights: HfWeights
    layers: tuple[str, ...]


def open_quantizable(folder: Path, *, group_size: int) -> QuantizableModel:
    """Open a folder and check that every linear layer of its blocks can be quantized in groups of `group_size` inputs.

    Raises ConversionError: for a model that is quantized already, that has experts, or whose architecture is not
    supported, and naming every layer whose shape does not suit.
    """
    if (folder / CONFIG_NAME).is_file() and (found := read_config(folder / CONFIG_NAME).get("quantization_config")):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ConversionError(
            f"{folder / CONFIG_NAME}, quantization_config: model must not be quantized yet, got {method}. "
            "Pass the model before quantization."
        )
    if folder.is_file():
        raise ConversionError(f"{folder}: must be a Hugging Face folder, got a file. Pass the folder it was made from.")
    if (folder / "latest_checkpointed_iteration.txt").is_file():
        raise ConversionError(
            f"{folder}: must be a Hugging Face folder, got a Megatron checkpoint. "
            "Export it first with checkpoint_convert/megatron_to_hf.py."
        )
    model = read_hf_model(folder)
    if model.shape.moe is not None:
        raise ConversionError(
            f"{folder}: model must have no experts, got {model.shape.moe.num_experts} per layer, for which "
            "the names that AutoRound gives them are not verified. Use checkpoint_convert/to_gguf.py --type q4_k_m."
        )
    weights = open_hf_weights(folder)
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in weights.shapes.items()
        if len(shape) == 2 and _BLOCK_LAYER.fullmatch(name)
    }
    if not layers:  # GPT-2, whose weights are stored the other way round
        raise ConversionError(
            f"{folder}: model must have linear layers named model.layers.*, got {model.family.hf_class}. "
            "Use checkpoint_convert/to_gguf.py."
        )
    if problems := list_shape_problems(layers, group_size):
        raise ConversionError(*problems)
    return QuantizableModel(folder=folder, model=model, weights=weights, layers=tuple(layers))


def list_shape_problems(layers: Mapping[str, tuple[int, ...]], group_size: int) -> list[str]:
    """A sentence for every layer [out, in] that groups of `group_size` inputs do not divide, with a size that does."""
    fitting = [size for size in GROUP_SIZES if all(shape[1] % size == 0 for shape in layers.values())]
    is_possible = all(math.gcd(*shape) % SIZE_MULTIPLE == 0 for shape in layers.values())
    remedy = (
        f"Pass --group-size {fitting[0]}."
        if fitting and is_possible
        else "No group size suits this model: use checkpoint_convert/to_gguf.py --type q8_0."
    )
    return [
        f"{layer}: inputs must be a multiple of the group size and both sizes of {SIZE_MULTIPLE}, "
        f"got {shape[1]} inputs and {shape[0]} outputs with --group-size {group_size}. {remedy}"
        for layer, shape in layers.items()
        if shape[1] % group_size or math.gcd(*shape) % SIZE_MULTIPLE
    ]
