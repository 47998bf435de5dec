"""Megatron functions whose fallbacks are slow on a CPU, replaced by faster ones.

Installed by `megatron_compat.install`; nothing else calls this module. benchmarks/RESULTS.md has what each one gains.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def swiglu_back(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of silu(gate) * up by [gate, up], joined on the last dimension [..., 2f]; grad: [..., f].

    megatron writes it out in nine elementwise steps and leaves it to torch.compile to fuse them, which is off on the
    CPU; torch's own silu kernels give the same to rounding in a sixth of the time.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * torch.nn.functional.silu(gate)), dim=-1)


def skip_gather_of_one_rank(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap all_gather_into_tensor: a group of one rank has nothing to gather, but gloo copies through a scratch buffer.

    Megatron's optimizer gathers into the buffer that already holds the shard, so there is nothing left to do.
    """

    def gather_into(output: Tensor, shard: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if torch.distributed.get_world_size(group) > 1 or output.data_ptr() != shard.data_ptr():
            return gather(output, shard, group=group, async_op=async_op)
        return None  # megatron waits for the group of calls, not for one

    return gather_into
