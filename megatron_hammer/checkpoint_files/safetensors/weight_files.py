"""Opens the weights of a Hugging Face folder: names, shapes and dtypes at once, each tensor only when it is read.

safetensors and pytorch_model.bin, in one file or in shards with an index. No tensor is copied: each is a memory map of
its own bytes, which goes away with the tensor, so that reading a whole model needs memory for one tensor at a time.
No code of a file is run. Which tensors a model must have is not known here; see checkpoint/hugging_face/.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.located_tensor import LocatedTensor, locate_in_storage, read_located
from megatron_hammer.checkpoint_files.pickle_reader import describe_failure
from megatron_hammer.checkpoint_files.safetensors.header import HeaderEntry, read_header
from megatron_hammer.checkpoint_files.saved_archive import open_archive
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.read import is_present

SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH_FILE, PYTORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HfWeights:
    """The tensors of a folder by name; obtain it with `open_hf_weights`.

    shapes, dtypes: of every tensor, in the order of the files. num_bytes: of all of them together.
    """

    def __init__(self, folder: Path, located: Mapping[str, LocatedTensor]):
        self.folder = folder
        self._located = located
        self.shapes = {name: tensor.shape for name, tensor in located.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in located.items()}
        self.num_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in located.values())

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._located[name].path

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored: a view of the file, whose pages leave memory with it; writing changes a copy.

        Raises ConversionError if the file has become shorter since it was opened.
        """
        return read_located(self._located[name], name)


def open_hf_weights(folder: Path) -> HfWeights:
    """Open the weights in `folder`: model.safetensors or, where there is none, pytorch_model.bin; or their shards.

    Raises ConversionError with a sentence for every shard that is missing, truncated or not of its format, every tensor
    that the index names and no shard holds, that a shard holds and the index does not name, or that two shards hold.
    """
    index_path, file_names = _find_files(folder)
    problems: list[str] = []
    held: dict[str, dict[str, LocatedTensor]] = {}
    for file_name in file_names:
        try:
            held[file_name] = _locate_tensors(folder / file_name)
        except ConversionError as error:
            problems.extend(error.problems)
    if index_path is not None:
        problems += _compare_with_index(index_path, held)
    times_held = Counter(name for tensors in held.values() for name in tensors)
    problems += [
        f"{folder}: {name} must be in one file, got it in {', '.join(file for file in held if name in held[file])}. "
        "Shards of two models are mixed; fetch the folder again."
        for name, times in times_held.items()
        if times > 1
    ]
    if problems:
        raise ConversionError(*problems)
    return HfWeights(folder, {name: located for tensors in held.values() for name, located in tensors.items()})


def _find_files(folder: Path) -> tuple[Path | None, list[str]]:
    """The index, if there is one, and the names of the files to read; transformers' own order of preference."""
    if not folder.is_dir():
        raise ConversionError(f"{folder}: model folder does not exist. Pass a Hugging Face folder.")
    for file_name, index_name in ((SAFETENSORS_FILE, SAFETENSORS_INDEX), (PYTORCH_FILE, PYTORCH_INDEX)):
        if is_present(folder / file_name, raises=ConversionError):
            _require_no_shards(folder / index_name, file_name)
            return None, [file_name]
        if is_present(folder / index_name, raises=ConversionError):
            weight_map = _read_weight_map(folder / index_name)
            return folder / index_name, sorted(set(weight_map.values()))
    present = sorted(entry.name for entry in folder.iterdir())[:20]
    raise ConversionError(
        f"{folder}: must hold {SAFETENSORS_FILE} or {PYTORCH_FILE}, or the index of its shards, got {present}. "
        "Fetch the whole folder."
    )


def _require_no_shards(index_path: Path, file_name: str) -> None:
    """transformers reads the file, llama.cpp and vLLM read the shards. An index alone is left by an earlier save."""
    if not is_present(index_path, raises=ConversionError):
        return
    shards = sorted(name for name in set(_read_weight_map(index_path).values()) if name != file_name)
    if present := [name for name in shards if is_present(index_path.with_name(name))]:
        raise ConversionError(
            f"{index_path.parent}: weights must be in one file or in shards, got {file_name} and {present[0]}. "
            "Programs differ in which they read; remove the ones that are not the model's."
        )


def _read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, each a plain name in the folder of the index."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        # A name with a folder in it, such as ../x, could point to any file of this machine.
        strange = [name for name in weight_map.values() if Path(name).name != name or name in ("", ".", "..")]
        if strange or not weight_map:
            raise ValueError(f"the file name {strange[0]!r}" if strange else "no tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path}: index must map every tensor to a file beside it, got {error}. Fetch the file again."
        ) from error
    return weight_map


def _compare_with_index(index_path: Path, held: Mapping[str, Mapping[str, LocatedTensor]]) -> list[str]:
    """Problems of the shards that could be opened; the others have been reported already."""
    weight_map = _read_weight_map(index_path)
    absent = [
        f"{index_path.with_name(file_name)}: must hold {name}, as {index_path.name} says, got no such tensor. "
        "Fetch the folder again."
        for name, file_name in weight_map.items()
        if file_name in held and name not in held[file_name]
    ]
    unnamed = [
        f"{index_path}: must name every tensor, got none for {name} of {file_name}. Fetch the folder again."
        for file_name, tensors in held.items()
        for name in tensors
        if name not in weight_map
    ]
    return absent + unnamed


def _locate_tensors(path: Path) -> dict[str, LocatedTensor]:
    if not path.is_file():
        raise ConversionError(f"{path}: shard does not exist. Fetch the whole folder.")
    return _locate_safetensors(path) if path.suffix == ".safetensors" else _locate_pickled(path)


def _locate_safetensors(path: Path) -> dict[str, LocatedTensor]:
    stored, _ = read_header(path)
    problems = [problem for name, tensor in stored.items() if (problem := _find_fault(name, tensor))]
    if problems:
        raise ConversionError(*problems)
    return {
        name: LocatedTensor(
            path=path,
            dtype=_DTYPES[tensor.dtype],
            shape=tensor.shape,
            stride=tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))),
            start=tensor.start,
        )
        for name, tensor in stored.items()
    }


def _find_fault(name: str, stored: HeaderEntry) -> str | None:
    """What is wrong with an entry of the header, if anything."""
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        return (
            f"{stored.path}: {name} must be of a dtype that PyTorch has, got {stored.dtype}. "
            "Pass the model before quantization."
        )
    # The header gives the size twice: by shape and dtype, and by its offsets.
    num_bytes = math.prod(stored.shape) * dtype.itemsize
    if num_bytes != stored.num_bytes:
        return (
            f"{stored.path}: {name} must have {num_bytes:,} bytes, as its shape and dtype say, "
            f"got {stored.num_bytes:,}. Fetch the file again."
        )
    return None


def _locate_pickled(path: Path) -> dict[str, LocatedTensor]:
    """Tensors of a file that torch.save wrote; its pickle may name tensors and plain containers only."""
    try:
        archive = open_archive(path)
        state = torch.serialization.load(path, map_location="meta" if archive else "cpu", weights_only=True)
    except Exception as error:  # damaged files can raise nearly anything
        raise ConversionError(
            f"{path}: file must be complete weights of torch.save, got {describe_failure(error)}. "
            "Fetch it again; it may be truncated, or hold more than tensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConversionError(
            f"{path}: file must hold tensors by name, got {_describe_contents(state)}. "
            "Save the model again with save_pretrained."
        )
    return {name: locate_in_storage(path, tensor, archive) for name, tensor in state.items()}


def _describe_contents(state: Any) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    name, value = next((name, value) for name, value in state.items() if not isinstance(value, Tensor))
    return f"{type(value).__name__} under {name!r}"
