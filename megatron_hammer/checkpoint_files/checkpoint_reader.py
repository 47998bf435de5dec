"""What the readers of all checkpoint formats share: their interface, and the names that they give to tensors."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hammer.errors import CheckpointError
from megatron_hammer.files.read import refuse_pipe

LATEST_FILE = "latest_checkpointed_iteration.txt"  # Megatron's pointer to the newest iteration of a folder
RELEASE = "release"  # in place of an iteration, in the pointer and as a folder: weights that no run continues from
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
# Buffers that a model's state has beside its parameters: fp32 whatever the dtype of these, and known to no optimizer.
BUFFER_ENDINGS = (".router.expert_bias",)
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")  # of torch_dist's keys; chained_0.optimizer. before megatron-core 0.13
# The local layer spec keeps its norms apart where TransformerEngine fuses them into the next linear layer.
_LOCAL_NORMS = {
    "input_layernorm.": ("self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.weight"),
    "pre_mlp_layernorm.": ("mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.weight"),
}


class DescribedTensor(Protocol):
    """What readers of every format know of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class CheckpointReader(Protocol):
    """One iteration of a checkpoint of any format, opened; obtain it with `open_checkpoint`.

    tensors: the model's, by mcore name. saved_args: the arguments that Megatron saved; args: the same under today's
    names, and complete (saved_arguments.py). iteration: of the saved state.
    """

    directory: Path
    saved_args: Any
    args: Any
    iteration: int

    @property
    def tensors(self) -> Mapping[str, DescribedTensor]: ...
    def remove_vocab_padding(self, vocab_size: int) -> None: ...
    def read(self, name: str) -> Tensor: ...


def remove_padding_rows(tensors: dict[str, Any], vocab_size: int) -> None:
    """Let the embedding and the head have `vocab_size` rows. tensors: a reader's, dataclasses with a `shape`."""
    for name in VOCABULARY_TENSORS:
        stored = tensors.get(name)
        if stored is not None and stored.shape[0] >= vocab_size:  # else the comparison of shapes reports it
            # Megatron pads at the end, so the first rows are the tokens. Only the description changes; reads follow it.
            tensors[name] = dataclasses.replace(stored, shape=(vocab_size, *stored.shape[1:]))


def name_folder(iteration: int | None) -> str:
    """The folder of an iteration in the directory of --save; None: of a release."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def name_dtype(dtype: torch.dtype) -> str:
    """bfloat16, float32, ..."""
    return str(dtype).removeprefix("torch.")


def read_tracker(folder: Path) -> int | str | None:
    """The iteration, or RELEASE, or another text that means nothing; None without a tracker."""
    path = folder / LATEST_FILE
    try:
        refuse_pipe(path, CheckpointError)
        # errors="replace": damage must become a sentence, not a UnicodeDecodeError.
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and len(text) < 19 else text


def validate_iteration(directory: Path, iteration: int) -> None:
    """Raise CheckpointError if the state is of another iteration than the name of its directory."""
    # A "release" directory names no iteration.
    named = re.fullmatch(r"iter_(\d+)", directory.name)
    if named and int(named[1]) != iteration:
        raise CheckpointError(
            f"{directory}: state must be of iteration {int(named[1])}, got iteration={iteration}. "
            "Files of two checkpoints are mixed; copy it again."
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
