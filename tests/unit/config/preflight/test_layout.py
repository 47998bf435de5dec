import pytest

from tests.helpers.parsed_flags import TINY, find, plan


@pytest.mark.parametrize(("instances", "num_problems"), [(1, 0), (2, 0), (3, 1), (16, 1)])
def test_instances_of_the_optimizer_divide_the_ranks_that_hold_the_same_weights(
    instances: int, num_problems: int
) -> None:
    flags = (*TINY, *plan(8), "--num-distributed-optimizer-instances", str(instances))
    problems = find(*flags, "--global-batch-size", "16", platform="cuda")
    assert len(problems) == num_problems
    if problems:
        assert "num-distributed-optimizer-instances: must divide the 8 ranks" in problems[0]
        assert f"got num_distributed_optimizer_instances={instances}." in problems[0]
        assert "Use 1, 2, 4 or 8." in problems[0]
