"""Passes in their order, each as early as possible: closed forms of Narayanan et al. 2021 (arXiv 2104.04473)."""

import pytest

from megatron_hammer.scaling.timeline.schedule import Pass, find_source, list_passes, place_passes


def test_a_single_stage_runs_each_micro_batch_forward_and_backward() -> None:
    passes = list_passes(0, 1, 1, 2)
    assert passes == [Pass(True, 0, 0), Pass(False, 0, 0), Pass(True, 0, 1), Pass(False, 0, 1)]


def test_a_pass_waits_for_its_neighbour_and_the_ends_for_the_next_chunk() -> None:
    assert find_source(0, Pass(True, 0, 4), 3, 2) is None
    assert find_source(2, Pass(True, 1, 4), 3, 2) == (1, Pass(True, 1, 4))
    assert find_source(0, Pass(True, 1, 4), 3, 2) == (2, Pass(True, 0, 4))
    assert find_source(0, Pass(False, 1, 4), 3, 2) == (1, Pass(False, 1, 4))
    assert find_source(2, Pass(False, 0, 4), 3, 2) == (0, Pass(False, 1, 4))
    assert find_source(2, Pass(False, 1, 4), 3, 2) == (2, Pass(True, 1, 4))


@pytest.mark.parametrize(("pp", "num_chunks", "num_microbatches"), [(4, 1, 9), (4, 1, 2), (3, 2, 6), (4, 5, 8)])
def test_equal_stages_take_as_long_as_the_closed_form(pp: int, num_chunks: int, num_microbatches: int) -> None:
    forward_s, backward_s = 3.0, 7.0  # of a whole stage
    placed = place_passes(
        pp, num_chunks, num_microbatches, lambda _, work: (forward_s if work.is_forward else backward_s) / num_chunks
    )
    ideal = (num_microbatches + (pp - 1) / num_chunks) * (forward_s + backward_s)
    assert max(works[-1].end_s for works in placed) == pytest.approx(ideal)


def test_sends_count_once_on_the_way_down_and_once_on_the_way_up() -> None:
    ends = [
        place_passes(3, 1, 5, lambda _, work: 1.0 if work.is_forward else 2.0, way_s=way_s)[0][-1].end_s
        for way_s in (0.0, 0.25)
    ]
    assert ends[1] - ends[0] == pytest.approx(2 * (3 - 1) * 0.25)
