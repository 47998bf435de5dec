import pytest

from megatron_hammer.config.preflight import host_memory
from megatron_hammer.model.accounting import count_parameters
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import TINY, parse


@pytest.fixture
def _four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_four_ranks")
def test_every_rank_gathers_the_whole_state_and_one_with_the_flag() -> None:
    save = (*TINY, "--save", "new", "--no-async-save")
    plan = parse(*save).require_plan()
    num_parameters = count_parameters(plan.model)
    thrifty = parse(*save, "--distrib-optim-fully-reshardable-mem-efficient").require_plan()
    difference = host_memory.estimate_host_bytes(plan) - host_memory.estimate_host_bytes(thrifty)
    assert difference == 3 * 12 * num_parameters  # TP1 PP1: one group, one rank of it instead of four
    copying = parse(*TINY, "--save", "new").require_plan()
    copied = host_memory.estimate_host_bytes(copying) - host_memory.estimate_host_bytes(plan)
    assert copied == pytest.approx(16 * num_parameters, abs=64)  # each rank copies its quarter


@pytest.mark.usefixtures("_four_ranks")
def test_a_save_that_no_host_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse(*TINY, "--save", "new").require_plan()
    assert host_memory.find_host_memory_problems(plan) == []
    needed = host_memory.estimate_host_bytes(plan)
    monkeypatch.setattr(host_memory, "read_device_memory_bytes", lambda platform: needed - 1)
    (problem,) = host_memory.find_host_memory_problems(plan)
    assert_problem(problem, "save:", "must fit in the memory of a host", "--distrib-optim-fully-reshardable-mem-eff")
    assert host_memory.find_host_memory_problems(parse(*TINY).require_plan()) == []
