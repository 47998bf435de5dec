"""The order of the passes of a pipeline rank, against megatron.core's own schedule."""

from types import SimpleNamespace

import pytest

from megatron_hammer.scaling.timeline.schedule import Pass, list_passes


@pytest.mark.parametrize(
    ("pp", "num_chunks", "num_microbatches"), [(3, 1, 7), (5, 1, 2), (3, 2, 6), (4, 3, 8), (2, 5, 2), (2, 2, 6)]
)
def test_the_order_is_that_of_megatron(pp: int, num_chunks: int, num_microbatches: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for pp_rank in range(pp):
        # Only its sizes are asked for, so no process group is needed.
        group = SimpleNamespace(size=lambda: pp, rank=lambda rank=pp_rank: rank)
        sizes = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None
        )
        table = get_schedule_table(num_microbatches, num_chunks, pp)
        total, _, num_warmup, _ = get_pp_rank_microbatches(num_microbatches, num_chunks, pp, p2p_communicator=sizes)
        forward = [Pass(True, chunk, microbatch) for microbatch, chunk in table]
        # Backward, chunks are taken from the last to the first (get_model_chunk_id of the interleaved schedule).
        backward = [Pass(False, num_chunks - 1 - chunk, microbatch) for microbatch, chunk in table]
        expected = forward[:num_warmup]
        for position in range(total):
            expected += forward[num_warmup + position :][:1]
            expected += backward[position : position + 1]
        assert list_passes(pp_rank, pp, num_chunks, num_microbatches) == expected
