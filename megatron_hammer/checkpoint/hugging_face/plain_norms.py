"""A checkpoint of --apply-layernorm-1p, read as one whose norms store the numbers that they multiply with.

Megatron then stores every norm's weight less 1 and adds the 1 in fp32 while it computes. No class of transformers that
is mapped does that, so the exported weight is the sum. It is exact in fp32; in 16 bits it is rounded.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.checkpoint_reader import CheckpointReader, DescribedTensor

_NORM_WEIGHT = re.compile(r"^decoder\..*(layer_norm_weight|layernorm\.weight)$")


class PlainNormReader:
    """A CheckpointReader of another one's checkpoint, with 1 added to the weights of the norms, which become fp32."""

    def __init__(self, reader: CheckpointReader):
        self._reader = reader
        self.directory, self.iteration = reader.directory, reader.iteration
        self.saved_args: Any = reader.saved_args
        self.args: Any = reader.args

    @property
    def tensors(self) -> Mapping[str, DescribedTensor]:
        return dict(self._describe())

    def remove_vocab_padding(self, vocab_size: int) -> None:
        self._reader.remove_vocab_padding(vocab_size)

    def read(self, name: str) -> Tensor:
        tensor = self._reader.read(name)
        return tensor.float() + 1 if _NORM_WEIGHT.match(name) else tensor

    def _describe(self) -> Iterator[tuple[str, Any]]:
        for name, stored in self._reader.tensors.items():
            is_norm = _NORM_WEIGHT.match(name)
            yield name, dataclasses.replace(stored, dtype=torch.float32) if is_norm else stored  # type: ignore[type-var]
