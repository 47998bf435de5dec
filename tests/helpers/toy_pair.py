"""A toy Megatron checkpoint and the Hugging Face folder of the same weights, written without the conversion's code."""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.hf_by_hand import list_shapes, permute_to_megatron, write_config
from tests.helpers.toy_checkpoint import write_toy_checkpoint
from tests.helpers.toy_model import PADDED_VOCAB_SIZE, VOCABULARY, toy_arguments


def write_toy_pair(
    folder: Path,
    changes: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    hf_dtype: torch.dtype | None = None,
    seed: int = 3,
    has_zero_centered_norms: bool = False,
) -> tuple[Path, Path]:
    """Random weights for `toy_arguments(**changes)` as (checkpoint directory, folder of transformers).

    Matrices have a standard deviation of 1/sqrt(width) and norms differ from 1, so that every part counts. dtype: of
    the checkpoint; hf_dtype: of the folder (the same). Rows of vocabulary padding are huge: to read one is noticed.
    has_zero_centered_norms: the checkpoint's norms lack the 1 that Megatron adds.
    """
    arguments = toy_arguments(**changes)
    config = write_config(arguments)
    generator = torch.Generator().manual_seed(seed)
    hf_tensors = {name: _draw(name, shape, generator).to(dtype) for name, shape in list_shapes(config).items()}
    if has_zero_centered_norms:
        # The folder's weights are the rounded sums, so those that the subtraction rounds are equal on both sides.
        is_hf_norm = re.compile(r"(norm|ln_\w+)\.weight$").search
        hf_tensors |= {name: (tensor - 1).float() + 1 for name, tensor in hf_tensors.items() if is_hf_norm(name)}
    tensors = permute_to_megatron(config, hf_tensors)
    for name in tensors.keys() & set(VOCABULARY):
        num_rows = max(0, PADDED_VOCAB_SIZE - len(tensors[name]))
        padding = torch.full((num_rows, tensors[name].shape[1]), 1e3, dtype=dtype)
        tensors[name] = torch.cat([tensors[name], padding])
    if has_zero_centered_norms:
        is_norm = re.compile(r"(layer_norm_weight|layernorm\.weight)$").search
        tensors = {name: (tensor - 1).to(dtype) if is_norm(name) else tensor for name, tensor in tensors.items()}
    write_toy_checkpoint(folder / "megatron", tensors, arguments=arguments)
    write_folder(folder / "hf", arguments, hf_tensors, hf_dtype or dtype)
    return folder / "megatron", folder / "hf"


def write_folder(hf_dir: Path, arguments: Namespace, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """What transformers needs to load a model of these saved arguments."""
    hf_dir.mkdir()
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, hf_dir / "model.safetensors", metadata={"format": "pt"})
    config = write_config(arguments) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (hf_dir / "config.json").write_text(json.dumps(config))


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
    if is_norm:
        return 1 + 0.3 * noise
    return noise * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)


def change_folder(hf_dir: Path, **changed: Tensor) -> None:
    """Put other tensors in place of some of the folder's; a dot in a name is spelt `__` here."""
    path = hf_dir / "model.safetensors"
    weights = load_file(path)
    replaced = {name.replace("__", "."): tensor.contiguous().clone() for name, tensor in changed.items()}
    assert replaced.keys() <= weights.keys()
    save_file(weights | replaced, path, metadata={"format": "pt"})


def read_folder(hf_dir: Path) -> dict[str, Tensor]:
    return load_file(hf_dir / "model.safetensors")
