"""A checkpoint scores tokens alike in one process and split over tensor- and pipeline-parallel ranks, and as
transformers does.

In nats, of log-probabilities around -10 in fp32, where sums are taken in another order: at most 1.3e-5 was measured.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from tests.helpers import scorer_ranks
from tests.helpers.scored_models import import_model, write_hf_model
from tests.helpers.scorer_ranks import NUM_TARGETS, list_sequences
from tests.helpers.training_runs import run_program

pytestmark = pytest.mark.distributed
TOLERANCE_NATS = 5e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scored")
    hf_dir = write_hf_model(folder / "hf")
    return hf_dir, import_model(hf_dir, folder / "checkpoint")


@pytest.fixture(scope="module")
def expected(models: tuple[Path, Path]) -> Any:
    return use_scorer(models[0], ScorerOptions(), scorer_ranks.measure)


def run_layout(path: Path, num_processes: int, tp: int, pp: int, output: Path) -> Any:
    result = run_program(Path(scorer_ranks.__file__), num_processes, str(path), str(tp), str(pp), str(output), "cpu")
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(output.read_text())


# The last has two copies of the model, which share the sequences of a request.
@pytest.mark.parametrize("num_processes, tp, pp", [(1, 1, 1), (4, 2, 2), (2, 1, 1)])
def test_every_layout_scores_and_continues_as_transformers(
    models: tuple[Path, Path], expected: Any, tmp_path: Path, num_processes: int, tp: int, pp: int
) -> None:
    for found in run_layout(models[1], num_processes, tp, pp, tmp_path / "scores.json"):
        for name in ("all", "last"):
            for ours, theirs in zip(found[name], expected[name], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE_NATS)
        assert found["is_greedy"] == expected["is_greedy"]
        assert found["continuations"] == expected["continuations"]


def test_the_scored_tokens_are_the_last_ones(expected: Any) -> None:
    assert [len(scores) for scores in expected["all"]] == [len(ids) - 1 for ids in list_sequences()]
    for scores, last, count in zip(expected["all"], expected["last"], NUM_TARGETS, strict=True):
        np.testing.assert_allclose(scores[-count:], last, rtol=0, atol=TOLERANCE_NATS)


def test_other_weights_are_noticed(models: tuple[Path, Path], expected: Any, tmp_path: Path) -> None:
    other = use_scorer(write_hf_model(tmp_path / "hf", seed=1), ScorerOptions(), scorer_ranks.measure)
    assert other is not None
    assert not np.allclose(other["all"][0], expected["all"][0], rtol=0, atol=TOLERANCE_NATS)
