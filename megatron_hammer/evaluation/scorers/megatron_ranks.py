"""The processes that hold one Megatron model together: how they meet, and how rank 0 asks them to compute.

Only rank 0 evaluates. The others wait for its requests, compute their part of each and send back what they know. Any
number of processes that is a multiple of tp x pp works: the further ones hold copies of the model and share the
sequences of a request.
"""

import atexit
import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hammer.checkpoint.verification.megatron_model import single_rank
from megatron_hammer.config.connections import set_connections
from megatron_hammer.config.environment import read_process_place
from megatron_hammer.errors import USER_ERROR_EXIT_CODE, ConfigError
from megatron_hammer.platforms import megatron_compat
from megatron_hammer.platforms.device import use_own_device

# How long a rank waits for rank 0, which meanwhile evaluates: a model of another kind, or what lies between requests.
PATIENCE = datetime.timedelta(days=30)
ENDED, FAILED = "ended", "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """Over how many processes the model is split, and on which platform."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    platform: str = "cpu"

    @property
    def num_ranks(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


class ModelRanks:
    """The joined processes; obtain them with `join_ranks`. control: a gloo group of all; None for one process."""

    def __init__(self, control: Any = None):
        from megatron.core import parallel_state

        self._control = control
        self.rank = torch.distributed.get_rank()
        self.copy = parallel_state.get_data_parallel_rank()
        self.num_copies = parallel_state.get_data_parallel_world_size()
        # The rank of each copy of the model whose results are complete: it has the last layers and speaks for its
        # tensor-parallel group.
        self.is_speaker = (
            parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    def ask(self, compute: Callable[[Any], list[Any]], request: Any, num_items: int) -> list[Any]:
        """On rank 0: have every rank compute its part of the request; returns an answer per item, in order.

        compute: of this rank; it returns answers for items copy, copy + num_copies, ..., and [] unless is_speaker.
        """
        if self._control is None:
            return compute(request)
        self._broadcast(request)
        return self._gather(compute(request), num_items)

    def serve(self, compute: Callable[[Any], list[Any]]) -> None:
        """On every other rank: answer requests until rank 0 ends. If it fails, this process exits too."""
        while (request := self._broadcast(None)) not in (ENDED, FAILED):
            self._gather(compute(request), 0)
        if request == FAILED:
            raise SystemExit(USER_ERROR_EXIT_CODE)  # rank 0 says why

    def end(self, *, has_failed: bool) -> None:
        """On rank 0: let the others go."""
        if self._control is not None:
            self._broadcast(FAILED if has_failed else ENDED)

    def _broadcast(self, request: Any) -> Any:
        message = [request]
        torch.distributed.broadcast_object_list(message, src=0, group=self._control)
        return message[0]

    def _gather(self, answers: list[Any], num_items: int) -> list[Any]:
        """On rank 0, the answers of all copies by item; [] elsewhere."""
        own = (self.copy, answers) if self.is_speaker else None
        parts: list[Any] | None = [None] * torch.distributed.get_world_size() if self.rank == 0 else None
        torch.distributed.gather_object(own, parts, dst=0, group=self._control)
        gathered: list[Any] = [None] * num_items
        for copy, answers_of_copy in filter(None, parts or []):
            gathered[copy :: self.num_copies] = answers_of_copy
        return gathered


def is_first_process() -> bool:
    """Whether this process evaluates; the others only compute for it."""
    return read_process_place().rank == 0


def validate_layout(layout: ModelLayout) -> None:
    """Raise ConfigError if the started processes cannot hold the model at this layout."""
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if (size := getattr(layout, name)) < 1:
            raise ConfigError(f"{name.replace('_', '-')}: must be at least 1, got {size}. Correct it.")
    world_size = read_process_place().world_size
    if world_size % layout.num_ranks:
        raise ConfigError(
            f"tensor-model-parallel-size x pipeline-model-parallel-size: must divide the number of processes, got "
            f"{layout.tensor_model_parallel_size} x {layout.pipeline_model_parallel_size} with {world_size}. "
            f"Start the command with torchrun --nproc-per-node {layout.num_ranks}."
        )


@contextlib.contextmanager
def join_ranks(layout: ModelLayout) -> Iterator[ModelRanks]:
    """Megatron's parallel state for the layout; a process that no launcher started is alone.

    Raises ConfigError if the number of processes does not fit.
    """
    validate_layout(layout)
    if layout.platform == "cuda":
        # Megatron refuses tensor parallelism without it on some GPUs; CUDA reads it when it starts.
        set_connections(("--tensor-model-parallel-size", str(layout.tensor_model_parallel_size)))
    megatron_compat.install(layout.platform)
    # What Megatron says here is about training: its newer model class, and the overlap of gradients.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if read_process_place().world_size == 1:
        with single_rank(layout.platform):
            yield ModelRanks()
        return
    if not torch.distributed.is_initialized():
        use_own_device(layout.platform, int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if layout.platform == "cuda" else "gloo", timeout=PATIENCE)
        # Kept until the process ends: the next model of the command uses the same group.
        atexit.register(torch.distributed.destroy_process_group)
    # The groups below are made within minutes, or not at all; only this waits for rank 0.
    torch.distributed.barrier()
    parallel_state.initialize_model_parallel(
        layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, create_gloo_process_groups=False
    )
    try:
        model_parallel_cuda_manual_seed(1234)
        yield ModelRanks(torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        parallel_state.destroy_model_parallel()
