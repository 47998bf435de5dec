"""A run whose ranks were started with other arguments, versions or data ends at its start, with the rank named."""

from pathlib import Path

import pytest

from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, run_program, write_toy_data

pytestmark = pytest.mark.distributed
PROGRAM = ROOT / "tests" / "helpers" / "unequal_rank.py"
# With another layout alone, the rank would wait for ever where the groups form.
FLAGS_OF_RANK_1 = "--lr 2e-3 --train-iters 7 --save-interval 3 --tensor-model-parallel-size 2"


def test_what_differs_is_named(tmp_path: Path) -> None:
    data, other = (write_toy_data(tmp_path / name, num_documents=60, seed=len(name)) for name in ("corpus", "other"))
    flags = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "6", "--data-path", data, "--save", str(tmp_path / "run"))
    result = run_program(PROGRAM, 2, *flags, FLAGS_OF_RANK_1=FLAGS_OF_RANK_1, DATA_OF_RANK_1=other)
    assert result.returncode == 2, result.stderr[-2000:]
    problems = result.stderr.splitlines()
    for named in (
        "arguments: lr: must be equal everywhere, got 0.003 on rank 0 (",
        "arguments: train_iters: must be equal everywhere, got 6 on rank 0 (",
        "arguments: save_interval: ",
        "arguments: tensor_model_parallel_size: ",
        "versions: torch: ",
        f"data files: {data}: ",
    ):
        (problem,) = {line for line in problems if named in line}
        assert "rank 1 (" in problem
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").glob("iter_*"))
