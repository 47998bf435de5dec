"""Any checkpoint as tensors by name that are read one at a time, so that they can be listed, measured and compared.

torch_dist at any layout, legacy mp_rank_* folders, Hugging Face folders; a Megatron checkpoint also under the names
that Hugging Face has for its tensors. No tensor is read before it is asked for, and no stored code is run.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, HfModel, read_hf_model
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.folder import count_extra_layers
from megatron_hammer.checkpoint.hugging_face.plain_norms import PlainNormReader
from megatron_hammer.checkpoint.hugging_face.saved_model import (
    has_zero_centered_norms,
    read_saved_dropout,
    read_saved_model,
)
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair
from megatron_hammer.checkpoint.hugging_face.tensor_sources import locate_hf_tensors
from megatron_hammer.checkpoint_files.open_checkpoint import find_iteration, is_legacy, open_checkpoint
from megatron_hammer.checkpoint_files.safetensors.weight_files import (
    PYTORCH_FILE,
    PYTORCH_INDEX,
    HfWeights,
    open_hf_weights,
)
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError
from megatron_hammer.model.shape import ModelShape

Format = Literal["torch_dist", "legacy", "Hugging Face"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorView:
    """A tensor that is read when `read` is called; shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedCheckpoint:
    """views: of the weights by Megatron's or Hugging Face's names. directory: one iteration, or the folder.

    reader: of a Megatron checkpoint. weights: of a Hugging Face folder. store: of torch_dist only.
    """

    directory: Path
    format: Format
    views: dict[str, TensorView]
    reader: Any = None
    weights: HfWeights | None = None

    @property
    def is_megatron(self) -> bool:
        return self.reader is not None

    @property
    def store(self) -> TorchDistStore | None:
        return getattr(self.reader, "store", None)  # the legacy reader has none

    @property
    def label(self) -> str:
        return f"{self.directory} ({self.format})"


def open_any(path: Path, *, iteration: int | None = None, weights: str = "model") -> OpenedCheckpoint:
    """Open what lies at `path`: a directory that Megatron saved into, one iteration of it, or a Hugging Face folder.

    weights: "model", or "master" for the fp32 copies in the optimizer's state.
    Raises HammerError naming every file that is missing, truncated or not of its format.
    """
    if is_hugging_face(path):
        if iteration is not None or weights != "model":
            raise CheckpointError(
                f"{path}: a Hugging Face folder has one set of weights, got iteration={iteration}, weights={weights}. "
                "Leave both out."
            )
        stored = open_hf_weights(path)
        return OpenedCheckpoint(directory=path, format="Hugging Face", views=view_folder(stored), weights=stored)
    directory = find_iteration(path, iteration)
    has_rank_files = is_legacy(directory)
    if not has_rank_files:
        TorchDistStore(directory).validate()  # every file, including those that the weights do not need
    reader = open_checkpoint(directory, weights=weights)
    views = {name: _view(reader, name) for name in reader.tensors}
    return OpenedCheckpoint(
        directory=directory, format="legacy" if has_rank_files else "torch_dist", views=views, reader=reader
    )


def is_hugging_face(path: Path) -> bool:
    """Whether the folder looks like one of Hugging Face's, complete or not."""
    names = (CONFIG_NAME, PYTORCH_FILE, PYTORCH_INDEX)
    # *.safetensors* finds model.safetensors.index.json too, of a folder whose weights were not fetched.
    return path.is_dir() and (any((path / name).is_file() for name in names) or any(path.glob("*.safetensors*")))


def _view(reader: Any, name: str) -> TensorView:
    stored = reader.tensors[name]
    return TensorView(shape=tuple(stored.shape), dtype=stored.dtype, read=partial(reader.read, name))


def view_folder(stored: HfWeights) -> dict[str, TensorView]:
    """The tensors of a Hugging Face folder under their stored names."""
    return {
        name: TensorView(shape=shape, dtype=stored.dtypes[name], read=partial(stored.read, name))
        for name, shape in stored.shapes.items()
    }


def view_store(store: TorchDistStore) -> dict[str, TensorView]:
    """Every tensor of a torch_dist directory under its own key, the optimizer's too."""
    return {
        key: TensorView(
            shape=stored.shape,
            dtype=stored.dtype,
            read=partial(store.read, key, [0] * len(stored.shape), stored.shape),
        )
        for key, stored in store.tensors.items()
    }


# --- the same tensors on both sides ----------------------------------------------------------------------------------


def view_as_hugging_face(opened: OpenedCheckpoint, folder: HfModel) -> dict[str, TensorView]:
    """A Megatron checkpoint's tensors under the names of a folder; unmapped tensors keep their own names.

    A tensor whose shape is not the model's cannot be split, and keeps its own name too.
    """
    model = folder.shape
    # Changes the reader itself, so every later view is without padding too.
    opened.reader.remove_vocab_padding(model.vocab_size)
    is_zero_centered = has_zero_centered_norms(opened.reader.args)
    reader = PlainNormReader(opened.reader) if is_zero_centered else opened.reader
    views: dict[str, TensorView] = {}
    mapped = set()
    for pair in expand(folder.family, model):
        stored = opened.reader.tensors.get(pair.megatron_name)
        if stored is None or tuple(stored.shape) != pair.megatron_shape:
            continue
        mapped.add(pair.megatron_name)
        views |= _view_parts(reader, pair, stored.dtype, model)
    return views | {name: _view(opened.reader, name) for name in opened.reader.tensors if name not in mapped}


def _view_parts(reader: Any, pair: TensorPair, dtype: torch.dtype, model: ModelShape) -> dict[str, TensorView]:
    def view(index: int) -> TensorView:
        return TensorView(
            shape=pair.hf_shapes[index],
            dtype=dtype,
            # Each part reads the whole Megatron tensor (q, k and v read linear_qkv three times), so that none is kept.
            # .to(dtype) rounds the norms that lack their 1 as an export does; all others have that dtype.
            read=lambda: pair.layout.split(reader.read(pair.megatron_name).to(dtype), model)[index],
        )

    return {name: view(index) for index, name in enumerate(pair.hf_names)}


def view_by_table_names(opened: OpenedCheckpoint, folder: HfModel) -> dict[str, TensorView]:
    """A Hugging Face folder's tensors under the names of the mapping, packed experts taken apart; buffers left out."""
    if opened.weights is None:
        raise ValueError("only a Hugging Face folder has them")
    stored = opened.weights
    found = locate_hf_tensors(
        expand(folder.family, folder.shape),
        folder.shape,
        stored.shapes,
        num_extra_layers=count_extra_layers(folder),
    )
    views = {name: opened.views[name] for name in found.shapes if name not in found.sources}

    def view(name: str) -> TensorView:
        source = found.sources[name]
        return TensorView(
            shape=found.shapes[name],
            dtype=stored.dtypes[source.name],
            read=lambda: source.select(stored.read(source.name)),
        )

    return {name: view(name) for name in found.sources} | views


def read_model(opened: OpenedCheckpoint, *, vocab_size: int | None = None) -> ModelShape:
    """The architecture that the checkpoint describes; raises ConversionError where no mapping expresses it."""
    if opened.is_megatron:
        return read_saved_model(opened.reader.args, vocab_size=vocab_size)
    return read_hf_model(opened.directory).shape


def describe_architecture(opened: OpenedCheckpoint) -> dict[str, Any]:
    """The model that the checkpoint describes and its dropout, by their fields; raises as `read_model` does."""
    if opened.is_megatron:
        model, dropout = read_model(opened), read_saved_dropout(opened.reader.args)
    else:
        found = read_hf_model(opened.directory)
        model, dropout = found.shape, found.dropout
    # kv_channels may be None for "hidden size / heads", so the head size itself is compared below.
    names = [field.name for field in dataclasses.fields(model) if field.compare and field.name != "kv_channels"]
    return {
        **{name: getattr(model, name) for name in names},
        "head_dim": model.head_dim,
        "attention_dropout": dropout.attention,
        "hidden_dropout": dropout.hidden,
    }
