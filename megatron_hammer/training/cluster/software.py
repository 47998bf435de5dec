"""What must be the same on all ranks: versions, environment variables that change a run, and data files."""

import os
import platform
import re
from importlib import metadata

import torch

import megatron_hammer
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.order.identity import identify_source
from megatron_hammer.data.sources import SPLIT_NAMES, DataPlan
from megatron_hammer.errors import DataError
from megatron_hammer.platforms.device_check import read_nccl_version

PACKAGES = ("megatron-core", "transformer-engine", "transformer-engine-torch", "flash-attn", "apex", "triton", "numpy")
_VARIABLES = re.compile(r"(NCCL|CUDA|TORCH|OMP|NVTE|GLOO|UCX|FI|PYTORCH)_\w+")
# These say which process this is, or where it lies.
_OF_ONE_PROCESS = re.compile(r"CUDA_VISIBLE_DEVICES|OMP_PLACES|TORCH_NCCL_DEBUG_INFO_\w+|NCCL_DEBUG_FILE")


def read_versions(driver: str | None) -> dict[str, str | None]:
    """By name; None of what is not installed. driver: the GPU's, where it is known."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": read_nccl_version(),
        "driver": driver,
        "megatron_hammer": megatron_hammer.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def read_variables() -> dict[str, str]:
    """The environment variables that libraries of a run read, except those that differ between processes by design."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name) and not _OF_ONE_PROCESS.fullmatch(name)
    }


def identify_data(sources: DataPlan) -> dict[str, str]:
    """Counts and fingerprint of each .bin/.idx pair that the run reads, by prefix; or why it cannot be read."""
    prefixes = dict.fromkeys(source.prefix for split in SPLIT_NAMES for source in sources.sources_of(split))
    found = {}
    for prefix in prefixes:
        try:
            identity = identify_source(prefix, read_index(prefix))
        except (DataError, OSError) as error:
            found[prefix] = f"not readable ({error})"
        else:
            found[prefix] = f"{identity.num_tokens:,} tokens, {identity.fingerprint}"
    return found
