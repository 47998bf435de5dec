from pathlib import Path

import pytest

from megatron_hammer.config.preflight import space
from megatron_hammer.model.accounting import count_parameters
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import TINY, find, parse


def test_the_newest_iteration_says_what_the_next_one_needs(tmp_path: Path) -> None:
    plan = parse(*TINY).require_plan()
    # fp32: the weight, its copy in the optimizer, and two moments; a run of the tests wrote 16.7 with the metadata.
    assert space.count_needed_bytes(plan, tmp_path) == 16 * count_parameters(plan.model)
    for iteration, size in ((2, 5), (10, 7)):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
        (tmp_path / f"iter_{iteration:07d}" / "__0_0.distcp").write_bytes(b"x" * size)
    (tmp_path / "iter_0000012").mkdir()  # nothing in it
    assert space.count_needed_bytes(plan, tmp_path) == 7


def test_preflight_refuses_a_run_that_could_not_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    (problem,) = find(*TINY, "--save", str(tmp_path / "new"))
    assert_problem(problem, "save: must have room", "0.0 GiB free")
    assert not [problem for problem in find(*TINY) if "room" in problem]
