"""A Hugging Face folder as a source of Megatron's tensors: architecture, weights and the table between them, checked.

Everything that can be known from config.json and the headers of the weights is validated when the folder is opened; no
tensor is read before it is asked for. `from_hugging_face.py` makes a checkpoint of it.
"""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.config_json import HfModel, read_hf_model
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair, validate_names_and_shapes
from megatron_hammer.checkpoint.hugging_face.tensor_sources import HfSources, locate_hf_tensors
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
from megatron_hammer.checkpoint_files.safetensors.weight_files import HfWeights, open_hf_weights
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.read import is_present
from megatron_hammer.model.shape import ModelShape

# fp8 and integers are quantized weights. Their scales lie in other tensors, which no row of the table reads.
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ADAPTER_NAME = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFolder:
    """One model, opened with `open_hf_folder`. pairs: every Megatron tensor and the table's names of its HF tensors."""

    folder: Path
    model: HfModel
    pairs: list[TensorPair]
    weights: HfWeights
    sources: HfSources

    def read(self, hf_name: str) -> Tensor:
        """The tensor of the table as it is stored: a view of the file."""
        source = self.sources.sources[hf_name]
        return source.select(self.weights.read(source.name))

    def dtype_of(self, hf_name: str) -> torch.dtype:
        """As it is stored."""
        return self.weights.dtypes[self.sources.sources[hf_name].name]

    def pair_dtype(self, pair: TensorPair) -> torch.dtype:
        """The dtype that holds every part of a Megatron tensor exactly."""
        # q, k and v may be stored in different dtypes, and Megatron has one tensor for the three.
        return reduce(torch.promote_types, map(self.dtype_of, pair.hf_names))

    def read_pair(self, pair: TensorPair) -> Tensor:
        """The whole Megatron tensor, without vocabulary padding."""
        dtype = self.pair_dtype(pair)
        return pair.layout.merge([self.read(name).to(dtype) for name in pair.hf_names], self.model.shape)

    def list_unequal_duplicates(self) -> list[str]:
        """A sentence for every stored tensor that should be a copy of another and is not; reads both."""
        return [
            f"{self.folder}: {stored} must equal {name}, since config.json ties them, got a difference. "
            "Set tie_word_embeddings to false in config.json if the model has a head of its own."
            for stored, name in self.sources.duplicates.items()
            if not is_bitwise_equal(self.weights.read(stored), self.read(name))
        ]


def open_hf_folder(folder: Path) -> HfFolder:
    """Open a folder in a form that transformers writes; reads config.json and the headers of the weights.

    Raises ConversionError naming everything in config.json that no mapping expresses, or every fault of the files, or
    every tensor that is missing, unexpected, of another shape or of a dtype that weights do not have.
    """
    model = read_hf_model(folder)
    weights = open_hf_weights(folder)
    # transformers adds it to the weights where peft is installed, so it is a part of the model that a user loads.
    if is_present(folder / ADAPTER_NAME):
        raise ConversionError(
            f"{folder / ADAPTER_NAME}: a folder of weights must hold no adapter, got one. Merge it with peft's "
            "merge_and_unload and save_pretrained, or remove it to convert the weights without it."
        )
    _require_plausible_counts(model.shape, weights)
    pairs = expand(model.family, model.shape)
    sources = locate_hf_tensors(pairs, model.shape, weights.shapes, num_extra_layers=count_extra_layers(model))
    # Both kinds of problem are collected, so that one run names everything that is wrong with the folder.
    expected = {name: shape for pair in pairs for name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)}
    problems = _list_strange_dtypes(weights, sources)
    try:
        validate_names_and_shapes(expected, sources.shapes, where=str(folder))
    except ConversionError as error:
        problems += error.problems
    if problems:
        raise ConversionError(*problems)
    return HfFolder(folder=folder, model=model, pairs=pairs, weights=weights, sources=sources)


def count_extra_layers(model: HfModel) -> int:
    """Layers of multi-token prediction behind the model's own; other families refuse them in config.json."""
    number = model.config.get("num_nextn_predict_layers")
    return number if type(number) is int else 0


def _require_plausible_counts(model: ModelShape, weights: HfWeights) -> None:
    """A damaged config.json may ask for so many layers or experts that their names do not fit in memory."""
    limits = {"num_hidden_layers": (model.num_layers, len(weights.shapes), "tensors")}
    if model.moe is not None:
        longest = max((size for shape in weights.shapes.values() for size in shape), default=0)
        limits["num_experts"] = (model.moe.num_experts, longest, "rows in its largest tensor")  # the router has them
    if problems := [
        f"config.json, {name}: must fit the weights, got {name}={count:,} for {limit:,} {what}. Fetch the folder again."
        for name, (count, limit, what) in limits.items()
        if count > limit
    ]:
        raise ConversionError(*problems)


def _list_strange_dtypes(weights: HfWeights, sources: HfSources) -> list[str]:
    used = sorted({source.name for source in sources.sources.values()} | sources.duplicates.keys())
    return [
        f"{weights.path_of(name)}: {name} must be bf16, fp16 or fp32, got {weights.dtypes[name]}. "
        "Pass the model before quantization."
        for name in used
        if weights.dtypes[name] not in WEIGHT_DTYPES
    ]
