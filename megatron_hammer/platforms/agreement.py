"""What the ranks of a run tell each other outside of training: plain objects, each function called by every rank."""

from collections.abc import Callable
from typing import Any

from megatron_hammer.errors import HammerError


def gather_from_ranks[T](value: T) -> list[T]:
    """The value of every rank, in the order of the ranks; of this process alone where there is no process group."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def ask_first_rank[T](answer: Callable[[], T]) -> T:
    """What `answer()` returns on rank 0, on every rank; also a HammerError that it raises there."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return answer()
    message: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            message = [(answer(), None)]
        except HammerError as error:
            message = [(None, error)]
    torch.distributed.broadcast_object_list(message, src=0)
    result, refusal = message[0]
    if refusal is not None:
        refusal.is_told = torch.distributed.get_rank() > 0
        raise refusal
    return result
