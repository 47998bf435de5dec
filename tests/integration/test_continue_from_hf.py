"""examples/continue_from_hf.sh as a user runs it first: without a model, without data, on two CPU processes."""

import os
import subprocess
from pathlib import Path

import pytest
import transformers

from tests.helpers.training_runs import read_lines

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "continue_from_hf.sh"
SIZES = {"CORPUS_BYTES": "300000", "PRETRAIN_STEPS": "6", "TRAIN_STEPS": "4", "SEQ_LENGTH": "64", "TP": "2"}


def test_a_model_is_made_continued_and_exported(tmp_path: Path) -> None:
    knobs = SIZES | {"OUTPUT_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(SCRIPT), "--platform", "cpu", "--eval-interval", "4"]
    result = subprocess.run(command, env=os.environ | knobs, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert "HF_DIR is not set: continuing" in result.stdout
    assert "DATA_PATH is not set: continuing on demonstration text" in result.stdout
    (weights,) = (line for line in result.stdout.splitlines() if line.startswith("weights: ") and "/hf (" in line)
    first, *_, last = read_lines(tmp_path / "metrics.jsonl")
    assert (first["step"], last["step"]) == (1, 4)
    before = transformers.AutoModelForCausalLM.from_pretrained(weights.split()[1])
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert after.num_parameters() == before.num_parameters() == 4_851_968
    assert (after.model.embed_tokens.weight != before.model.embed_tokens.weight).any()
