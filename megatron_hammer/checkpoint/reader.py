"""Reads a torch_dist checkpoint of any layout, one tensor at a time, with no process group, GPU or megatron.

torch_dist keeps global tensors cut into chunks, and the layers of a model stacked into one tensor with a leading
layer axis (and experts with an expert axis after it). Here every layer and expert has a name of its own,
`decoder.layers.3.mlp.experts.experts.1.linear_fc1.weight`, and a read touches only the chunks it needs.
Optimizer state and megatron's `_extra_state` are left out.
"""

import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.safe_unpickle import read_metadata, read_object
from megatron_hammer.errors import CheckpointError

LATEST_FILE = "latest_checkpointed_iteration.txt"
COMMON_STATE_KEY = "common_state/shard_0_1"
LEGACY_COMMON_FILE = "common.pt"
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")

_STACKED_LAYERS = re.compile(r"^(decoder\.layers)\.(?!\d)")
_STACKED_EXPERTS = re.compile(r"(\.mlp\.experts\.experts)\.(?!\d)")
# The local layer spec keeps its norms apart where TransformerEngine fuses them into the next linear layer.
_LOCAL_NORMS = {
    "input_layernorm.": ("self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.weight"),
    "pre_mlp_layernorm.": ("mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.weight"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where one tensor of one layer lies: a box in a stored global tensor, whose leading axes `shape` leaves out."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """One iteration of a checkpoint, opened; obtain it with `open_checkpoint`.

    tensors: the model's, by mcore name. args: the arguments that Megatron saved. iteration: of the saved state.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._metadata = read_metadata(directory / ".metadata")
        self.tensors = use_fused_norm_names(dict(self._list_tensors()))
        self._validate_files()
        common_state = self._read_common_state()
        if "args" not in common_state or "iteration" not in common_state:
            raise CheckpointError(
                f"{directory}: common state must hold args and iteration, got {sorted(common_state)}. "
                "Pass a checkpoint that Megatron's training loop saved."
            )
        self.args: Any = common_state["args"]
        self.iteration: int = common_state["iteration"]

    def remove_vocab_padding(self, vocab_size: int) -> None:
        """From here on the embedding and the head have `vocab_size` rows; the padding is never read."""
        for name in VOCABULARY_TENSORS:
            stored = self.tensors.get(name)
            if stored is None or stored.shape[0] < vocab_size:
                continue  # the comparison of shapes reports it
            rows = (vocab_size, *stored.shape[1:])
            self.tensors[name] = replace(stored, sizes=rows, shape=rows)

    def read(self, name: str) -> Tensor:
        """The tensor of that mcore name, contiguous and in its stored dtype.

        Raises CheckpointError if a chunk is missing or damaged.
        """
        stored = self.tensors[name]
        result = torch.empty(stored.sizes, dtype=stored.dtype)
        num_filled = 0
        for chunk in self._metadata.state_dict_metadata[stored.key].chunks:
            overlap = _overlap(stored, tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is None:
                continue
            into, out_of = overlap
            part = self._read_chunk(stored.key, chunk)[out_of]
            result[into] = part
            num_filled += part.numel()
        if num_filled != result.numel():
            raise CheckpointError(
                f"{self.directory}: {name} must have {result.numel()} elements in its chunks, got {num_filled}. "
                "Some ranks did not finish saving; use another iteration."
            )
        return result.reshape(stored.shape)

    def _validate_files(self) -> None:
        """Raise one CheckpointError with a sentence for every data file of the model that is missing or too short."""
        needed_bytes: dict[str, int] = {}
        keys = {COMMON_STATE_KEY, *(stored.key for stored in self.tensors.values())}
        for index, info in self._metadata.storage_data.items():
            if index.fqn in keys:
                end = info.offset + info.length
                needed_bytes[info.relative_path] = max(needed_bytes.get(info.relative_path, 0), end)
        problems = []
        for name, num_bytes in sorted(needed_bytes.items()):
            path = self.directory / name
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            if not path.is_file() or path.stat().st_size < num_bytes:
                problems.append(
                    f"{path}: must hold at least {num_bytes} bytes, got {found}. "
                    "The save was interrupted or the copy is incomplete; use another iteration or copy it again."
                )
        if problems:
            raise CheckpointError(*problems)

    def _list_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        for key, metadata in self._metadata.state_dict_metadata.items():
            is_tensor = hasattr(metadata, "chunks")
            if is_tensor and not key.startswith(("optimizer.", "chained_")) and "_extra_state" not in key:
                yield from _unstack(key, tuple(metadata.size), metadata.properties.dtype)

    def _read_chunk(self, key: str, chunk: Any) -> Tensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        part = self._read_item(MetadataIndex(key, chunk.offsets))
        if not isinstance(part, Tensor) or part.shape != chunk.sizes:
            raise CheckpointError(
                f"{self.directory}: {key} must have a chunk of shape {tuple(chunk.sizes)} at {tuple(chunk.offsets)}, "
                f"got {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}. "
                "The file is damaged; use another iteration."
            )
        return part

    def _read_item(self, index: Any) -> Any:
        info = self._metadata.storage_data.get(index)
        if info is None or getattr(info, "transform_descriptors", None):
            what = "nothing" if info is None else f"data transformed by {info.transform_descriptors}"
            raise CheckpointError(
                f"{self.directory / '.metadata'}: {index.fqn} must be stored as plain data, got {what}. "
                "Save the checkpoint again with --ckpt-format torch_dist."
            )
        path = self.directory / info.relative_path
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                data = file.read(info.length)
        except OSError as error:
            raise CheckpointError(f"{path}: file must be readable, got {error.strerror}. Copy it again.") from error
        return read_object(io.BytesIO(data), where=f"{path} ({index.fqn})")

    def _read_common_state(self) -> dict[str, Any]:
        """megatron-core 0.19 stores it among the shards; earlier versions in common.pt."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        legacy_path = self.directory / LEGACY_COMMON_FILE
        if legacy_path.is_file():
            return read_object(io.BytesIO(legacy_path.read_bytes()), where=legacy_path)
        state = self._read_item(MetadataIndex(COMMON_STATE_KEY))
        return state[0] if isinstance(state, list) else state


def open_checkpoint(path: str | Path, *, iteration: int | None = None) -> CheckpointReader:
    """Open `path`: a directory that Megatron saved into (the latest or the given iteration) or one iteration of it.

    Raises CheckpointError if it is not there, is of another format, or the state is of another iteration than its name.
    """
    directory = find_iteration(Path(path), iteration)
    _validate_format(directory)
    reader = CheckpointReader(directory)
    named = re.fullmatch(r"iter_(\d+)", directory.name)
    if named and int(named[1]) != reader.iteration:
        raise CheckpointError(
            f"{directory}: state must be of iteration {int(named[1])}, got iteration={reader.iteration}. "
            "Files of two checkpoints are mixed; copy it again."
        )
    return reader


def find_iteration(path: Path, iteration: int | None = None) -> Path:
    """The directory of one iteration under `path`; raises CheckpointError naming what is there instead."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: checkpoint directory does not exist. Pass the directory given to --save.")
    if (path / ".metadata").is_file():
        return path
    if (path / LATEST_FILE).is_file() and iteration is None:
        tracker = (path / LATEST_FILE).read_text().strip()
        if not (tracker.isdigit() or tracker == "release"):
            raise CheckpointError(
                f"{path / LATEST_FILE}: must hold an iteration or 'release', got {tracker[:40]!r}. Pass --iteration."
            )
        directory = path / ("release" if tracker == "release" else f"iter_{int(tracker):07d}")
    elif iteration is None:
        raise CheckpointError(
            f"{path}: must hold {LATEST_FILE} or be one iteration with its .metadata, got neither. "
            "Pass the directory given to --save."
        )
    else:
        directory = path / f"iter_{iteration:07d}"
    if not directory.is_dir():
        present = sorted(entry.name for entry in path.glob("iter_*")) or "none"
        raise CheckpointError(f"{directory}: iteration does not exist, got {present}. Pass --iteration of one of them.")
    return directory


def _validate_format(directory: Path) -> None:
    if list(directory.glob("mp_rank_*")):
        raise CheckpointError(
            f"{directory}: format must be torch_dist, got a legacy checkpoint of mp_rank_* files. "
            "Load it in training with --auto-detect-ckpt-format and save it with --ckpt-format torch_dist."
        )
    description = directory / "metadata.json"
    try:
        backend = json.loads(description.read_bytes())["sharded_backend"] if description.is_file() else "torch_dist"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{description}: must name the sharded_backend, got {error}. The copy is incomplete; copy it again."
        ) from error
    if backend != "torch_dist":
        raise CheckpointError(
            f"{directory}: format must be torch_dist, got sharded_backend={backend}. "
            "Load it in training and save it with --ckpt-format torch_dist."
        )


def _unstack(key: str, size: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    """One entry for every layer and expert of a stored tensor whose leading axes they are."""
    name, num_stacked = key, 0
    for pattern in (_STACKED_LAYERS, _STACKED_EXPERTS):
        name, num_found = pattern.subn(r"\1.{}.", name)
        num_stacked += num_found
    for indices in itertools.product(*map(range, size[:num_stacked])):
        shape = size[num_stacked:]
        yield (
            name.format(*indices),
            StoredTensor(
                key=key,
                offsets=(*indices, *([0] * len(shape))),
                sizes=(*([1] * num_stacked), *shape),
                shape=shape,
                dtype=dtype,
            ),
        )


def use_fused_norm_names[T](tensors: dict[str, T]) -> dict[str, T]:
    """Names of the local layer spec become TransformerEngine's, which the mapping is written on."""
    renamed = {}
    for name, stored in tensors.items():
        for local, (fused, linear) in _LOCAL_NORMS.items():
            if local in name and name.split(local)[0] + linear in tensors:
                name = name.replace(local, fused)
        renamed[name] = stored
    return renamed


def _overlap(
    stored: StoredTensor, chunk_offsets: tuple[int, ...], chunk_sizes: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The slices of the wanted box and of the chunk that are the same elements; None if they do not touch."""
    into, out_of = [], []
    for start, size, chunk_start, chunk_size in zip(
        stored.offsets, stored.sizes, chunk_offsets, chunk_sizes, strict=True
    ):
        first, last = max(start, chunk_start), min(start + size, chunk_start + chunk_size)
        if first >= last:
            return None
        into.append(slice(first - start, last - start))
        out_of.append(slice(first - chunk_start, last - chunk_start))
    return tuple(into), tuple(out_of)
