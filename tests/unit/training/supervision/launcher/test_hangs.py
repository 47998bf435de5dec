from dataclasses import replace

import pytest

from megatron_hammer.training.supervision.launcher.hangs import HangLimit, RankView, find_behind, find_hang

LIMIT = HangLimit(timeout_s=600.0)


def view(rank: int, **values) -> RankView:
    usual = RankView(
        rank=rank, host=f"host{rank // 2}", pid=1000 + rank, step=57, phase="training", is_waiting=True, num_waits=900,
        age_s=400.0, is_stopped=False,
    )  # fmt: skip
    return replace(usual, **values)


def test_a_run_that_moves_on_any_rank_does_not_hang() -> None:
    assert find_hang([view(0), view(1, age_s=3.0)], LIMIT) is None
    assert find_hang([], LIMIT) is None


def test_the_rank_that_is_not_in_a_collective_is_behind() -> None:
    hang = find_hang([view(0), view(1), view(2), view(3, is_waiting=False, phase="saving")], LIMIT)
    assert hang is not None
    assert [one.rank for one in hang.behind] == [3]
    assert list(hang.hosts) == ["host1"]
    for fact in ("for 400 s", "rank 3 on host1 (process 1003, after step 57, saving) is behind"):
        assert fact in hang.message


def test_where_hosts_do_not_wait_as_on_gpus_the_one_that_has_done_less_is_behind() -> None:
    busy = [view(rank, is_waiting=False) for rank in range(4)]
    assert [one.rank for one in find_behind([*busy[:3], replace(busy[3], num_waits=899)])] == [3]
    assert [one.rank for one in find_behind([*busy[:3], replace(busy[3], step=56, num_waits=999)])] == [3]


def test_where_all_wait_equally_it_is_the_network() -> None:
    hang = find_hang([view(0), view(2)], LIMIT)
    assert hang is not None
    assert list(hang.behind) == []
    assert "the network between host0, host1 does not pass on data" in hang.message


def test_a_stopped_rank_is_named_at_once() -> None:
    stopped = view(1, is_stopped=True, age_s=11.0)
    hang = find_hang([view(0, age_s=9.0), stopped], LIMIT)
    assert hang is not None
    assert "rank 1 on host0" in hang.message
    assert "kill -CONT 1001" in hang.message
    assert find_hang([view(0, age_s=9.0), replace(stopped, age_s=4.0)], LIMIT) is None


def test_many_ranks_are_counted() -> None:
    hang = find_hang([view(0), *(view(rank, is_waiting=False) for rank in range(1, 9))], LIMIT)
    assert hang is not None
    assert "rank 4 on host2" in hang.message
    assert "and 4 more" in hang.message


def note_steps(limit: HangLimit, step_time_s: float) -> HangLimit:
    for step in range(1, 6):
        limit.note_step(step, step * step_time_s)
    return limit


@pytest.mark.parametrize(("step_time_s", "limit_s"), [(0.5, 60.0), (20.0, 200.0), (90.0, 300.0)])
def test_the_limit_follows_the_steps_and_stays_below_the_timeout(step_time_s: float, limit_s: float) -> None:
    limit = note_steps(HangLimit(timeout_s=600.0), step_time_s)
    assert limit.find_limit_s("training") == limit_s
    assert limit.find_limit_s("saving") == 300.0
    assert HangLimit(timeout_s=600.0).find_limit_s("training") == 300.0, "a first step may compile"


def test_the_users_limit_is_for_what_has_a_usual_length() -> None:
    limit = note_steps(HangLimit(timeout_s=600.0, fixed_s=5.0), 20.0)
    assert (limit.find_limit_s("training"), limit.find_limit_s("saving")) == (5.0, 5.0)
    assert limit.find_limit_s("building the data") == 300.0
