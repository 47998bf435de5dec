import pytest

from megatron_hammer.training.supervision.launcher.restart_rule import RestartRule


def fail(rule: RestartRule, *saved_steps: int, has_finished_step: bool = True) -> list[str | None]:
    return [rule.refuse(has_finished_step=has_finished_step, saved_step=saved_step) for saved_step in saved_steps]


def test_a_run_that_gets_further_is_started_again_as_often_as_was_asked_for() -> None:
    rule = RestartRule(4, 0)
    *allowed, last = fail(rule, 10, 20, 30, 40, 50)
    assert allowed == [None] * 4
    assert last is not None
    assert "--max-restarts is 4" in last


def test_three_restarts_that_reach_no_checkpoint_are_the_last() -> None:
    rule = RestartRule(100, 10)
    *allowed, last = fail(rule, 10, 10, 10, 10)
    assert allowed == [None] * 3
    assert last is not None
    assert "3 restarts in a row" in last


def test_a_new_checkpoint_forgives_those_that_reached_none() -> None:
    assert fail(RestartRule(100, 0), 0, 0, 0, 10, 10, 10) == [None] * 6


def test_a_restart_without_a_step_counts_double() -> None:
    rule = RestartRule(4, 0)
    # Each reaches a new checkpoint, as if another process wrote them, so that only the count ends it.
    assert fail(rule, 1, 2, has_finished_step=False) == [None, None]
    assert (rule.num_restarts, rule.num_counted) == (2, 3)
    (last,) = fail(rule, 3, has_finished_step=False)
    assert last is not None
    assert "2 restarts are made" in last


def test_a_first_attempt_without_a_step_is_no_restart() -> None:
    assert fail(RestartRule(1, 0), 0, has_finished_step=False) == [None]


@pytest.mark.parametrize("saved_step", [0, 50])
def test_none_is_started_again_unless_asked_for(saved_step: int) -> None:
    assert fail(RestartRule(0, 0), saved_step) == ["--max-restarts is 0"]
