"""examples/continue_from_hf.sh as a user runs it first: without a model, without data, on two CPU processes."""

from pathlib import Path

import pytest
import transformers

from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.tool_runs import run_example
from tests.helpers.training_runs import read_lines

pytestmark = pytest.mark.integration

SIZES = {"CORPUS_BYTES": "300000", "PRETRAIN_STEPS": "6", "TRAIN_STEPS": "4", "SEQ_LENGTH": "64", "TP": "2"}


def test_a_model_is_made_continued_and_exported(tmp_path: Path) -> None:
    flags = ("--platform", "cpu", "--eval-interval", "4")
    result = run_example(
        "continue_from_hf.sh", *flags, timeout_s=900, OUTPUT_DIR=tmp_path, OMP_NUM_THREADS="1", **SIZES
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert "HF_DIR is not set: continuing" in result.stdout
    assert "DATA_PATH is not set: continuing on demonstration text" in result.stdout
    (weights,) = (line for line in result.stdout.splitlines() if line.startswith("weights: ") and "/hf (" in line)
    first, *_, last = read_lines(tmp_path / "metrics.jsonl")
    assert (first["step"], last["step"]) == (1, 4)
    saved = open_checkpoint(tmp_path).args
    assert saved.tokenizer_sha256 == load_encoder(saved.tokenizer_model).sha256
    before = transformers.AutoModelForCausalLM.from_pretrained(weights.split()[1])
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert after.num_parameters() == before.num_parameters() == 4_851_968
    assert (after.model.embed_tokens.weight != before.model.embed_tokens.weight).any()
