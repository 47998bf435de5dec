"""A checkpoint is scored on the cuda platform as by transformers: NCCL, its own GPU for each rank, one connection.

In nats, of log-probabilities around -10 in fp32: at most 1.3e-5 was measured.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from tests.helpers import scorer_ranks
from tests.helpers.scored_models import import_model, write_hf_model
from tests.helpers.training_runs import run_program

TOLERANCE_NATS = 5e-5


@pytest.mark.parametrize(("num_processes", "tp", "pp"), [(1, 1, 1), (4, 2, 2)])
def test_gpus_score_and_continue_as_transformers(tmp_path: Path, num_processes: int, tp: int, pp: int) -> None:
    hf_dir = write_hf_model(tmp_path / "hf")
    expected = use_scorer(hf_dir, ScorerOptions(), scorer_ranks.measure)
    assert expected is not None
    flags = (str(import_model(hf_dir, tmp_path / "checkpoint")), str(tp), str(pp), str(tmp_path / "scores"), "cuda")
    result = run_program(Path(scorer_ranks.__file__), num_processes, *flags, gpu="h100")
    assert result.returncode == 0, result.stderr[-4000:]
    for found in json.loads((tmp_path / "scores").read_text()):
        for ours, theirs in zip(found["all"], expected["all"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE_NATS)
        assert found["continuations"] == expected["continuations"]
