"""The order of the passes of a pipeline, and when each of them runs: 1F1B, and its interleaved form.

Durations are given by the caller (trace.py, which takes them from the cost model). Nothing here estimates a time.
"""

from collections.abc import Callable
from typing import NamedTuple


class Pass(NamedTuple):
    """One micro-batch through one chunk of a stage's layers, forward or backward."""

    is_forward: bool
    chunk: int
    microbatch: int


class PlacedPass(NamedTuple):
    work: Pass
    start_s: float
    end_s: float


Duration = Callable[[int, Pass], float]  # of a pass on a pipeline rank, in seconds


def list_passes(pp_rank: int, pp: int, num_chunks: int, num_microbatches: int) -> list[Pass]:
    """The passes of one pipeline rank in the order in which Megatron runs them.

    Warm-up forward passes, then one forward and one backward pass in turns, then the remaining backward passes.
    Interleaved stages take micro-batches in groups of pp through each chunk. Source: get_pp_rank_microbatches and
    get_schedule_table of megatron.core.pipeline_parallel.schedules, which a test compares.
    """
    forward = _list_forward(pp, num_chunks, num_microbatches)
    backward = [Pass(False, num_chunks - 1 - work.chunk, work.microbatch) for work in forward]
    num_warmup = pp - pp_rank - 1
    if num_chunks > 1:
        num_warmup = 2 * num_warmup + (num_chunks - 1) * pp
    num_warmup = min(num_warmup, len(forward))
    steady = [work for pair in zip(forward[num_warmup:], backward, strict=False) for work in pair]
    return forward[:num_warmup] + steady + backward[len(forward) - num_warmup :]


def _list_forward(pp: int, num_chunks: int, num_microbatches: int) -> list[Pass]:
    return [
        Pass(True, chunk, microbatch)
        for first in range(0, num_microbatches, pp)
        for chunk in range(num_chunks)
        for microbatch in range(first, min(first + pp, num_microbatches))
    ]


def find_source(pp_rank: int, work: Pass, pp: int, num_chunks: int) -> tuple[int, Pass] | None:
    """The pass on which this one waits, and its rank. None for the first chunk's forward pass."""
    forward_step = 1 if work.is_forward else -1
    rank, chunk = pp_rank - forward_step, work.chunk
    if not 0 <= rank < pp:  # the neighbour of an end is the other end, at the chunk before
        rank, chunk = rank % pp, chunk - forward_step
    if 0 <= chunk < num_chunks:
        return rank, work._replace(chunk=chunk)
    # Past the model's last layer a backward pass waits for its own forward pass.
    return None if work.is_forward else (pp_rank, work._replace(is_forward=True))


def place_passes(
    pp: int, num_chunks: int, num_microbatches: int, duration_s: Duration, *, way_s: float = 0.0
) -> list[list[PlacedPass]]:
    """When every pass of every rank runs, each as early as its rank and its source allow.

    way_s: of one send from stage to stage, where nothing hides it. These are the first micro-batch's sends through the
    filling pipeline and the last micro-batch's sends through the draining one.
    """
    orders = [list_passes(rank, pp, num_chunks, num_microbatches) for rank in range(pp)]
    placed: list[list[PlacedPass]] = [[] for _ in range(pp)]
    ends: dict[tuple[int, Pass], float] = {}
    first, last = Pass(True, 0, 0), Pass(False, 0, num_microbatches - 1)
    while len(ends) < sum(map(len, orders)):
        before = len(ends)
        for rank, order in enumerate(orders):
            while len(placed[rank]) < len(order):
                work = order[len(placed[rank])]
                source = find_source(rank, work, pp, num_chunks)
                if source is not None and source not in ends:
                    break
                free_s = placed[rank][-1].end_s if placed[rank] else 0.0
                arrival_s = ends[source] if source is not None else 0.0
                if source is not None and source[0] != rank and work in (first, last):
                    arrival_s += way_s
                start_s = max(free_s, arrival_s)
                ends[rank, work] = start_s + duration_s(rank, work)
                placed[rank].append(PlacedPass(work, start_s, ends[rank, work]))
        assert len(ends) > before, "the order of the passes has a circle"
    return placed
