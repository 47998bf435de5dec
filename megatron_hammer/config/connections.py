"""CUDA_DEVICE_MAX_CONNECTIONS, which CUDA reads once, when it is initialised, and the GPU on which it depends.

Arguments are read as a mapping: of flags (`Flags.values`) or of a namespace (`vars`).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.platforms import cuda

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = 10  # major compute capability
SIZES = ("tensor_model_parallel_size", "context_parallel_size")
FREE = ("use_torch_fsdp2", "use_megatron_fsdp", "overlap_moe_expert_parallel_comm")  # with these the order is free


def set_connections(argv: Sequence[str]) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where megatron needs it; call it before anything initialises CUDA.

    With tensor or context parallelism, megatron relies on kernels starting in the order of their launches, so that a
    collective starts before the matrix product that hides it. One connection keeps that order. FSDP needs several: its
    gathers must not wait behind the products. GPUs since Blackwell keep the order by themselves. A value that the user
    has set is left alone; preflight refuses one that megatron cannot use.
    """
    if not _asks_for_one_connection(argv):
        return
    capability = cuda.read_compute_capability()
    if capability is not None and capability[0] < BLACKWELL:
        os.environ.setdefault(CONNECTIONS, "1")


def _asks_for_one_connection(argv: Sequence[str]) -> bool:
    """`needs_one_connection` of a command line that is not parsed yet."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", default="1")
    for name in FREE:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    return needs_one_connection(vars(parser.parse_known_args(list(argv))[0]))


def needs_one_connection(arguments: Mapping[str, Any]) -> bool:
    """As megatron.training.arguments.validate_args decides for GPUs before Blackwell."""
    return any(str(arguments[name]) != "1" for name in SIZES) and not any(arguments[name] for name in FREE)


def is_for_elsewhere(arguments: Mapping[str, Any]) -> bool:
    """Whether this is the plan of a run on a cluster, whatever this login node has."""
    return arguments["dry_run"] and arguments["requested_world_size"] is not None


def read_run_capability(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Compute capability of the GPU that a run would use; None where it uses none, or one that is not here."""
    return None if arguments["platform"] != "cuda" or is_for_elsewhere(arguments) else cuda.read_compute_capability()
