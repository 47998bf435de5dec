"""Two runs of one seed are equal bit for bit, with --deterministic too; the first tensor that differs is named."""

from pathlib import Path

import pytest

from megatron_hammer.cli.compare_runs import main as compare_runs
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, run, run_program, write_toy_data

pytestmark = pytest.mark.distributed
LAYOUT = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")


def compare(capsys: pytest.CaptureFixture[str], first: Path, second: Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        compare_runs(["--bit-exact", "--runs", f"one={first / 'metrics.jsonl'}", f"two={second / 'metrics.jsonl'}"])
    return int(stop.value.code or 0), capsys.readouterr().out


def test_the_first_bit_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_toy_data(tmp_path / "corpus", num_documents=120)
    own = (*TOY_MODEL, *TOY_SCHEDULE, *LAYOUT, "--data-path", data, "--train-iters", "4", "--fingerprint-interval", "1")
    one, two, other, spoiled = (tmp_path / name for name in ("one", "two", "other", "spoiled"))
    for folder, *flags in ((one,), (two, "--deterministic"), (other, "--seed", "7")):
        result = run(2, *own, "--save", str(folder), "--save-interval", "3", *flags)
        assert result.returncode == 0, result.stderr[-2000:]
    program = ROOT / "tests" / "helpers" / "bad_batch.py"
    result = run_program(program, 2, *own, "--save", str(spoiled), BAD_SAMPLES="16", FACTOR="1.0000001")
    assert result.returncode == 0, result.stderr[-2000:]

    assert compare(capsys, one, two) == (0, "two, compared with one: equals it bit for bit in 4 steps of 2 ranks\n")
    code, text = compare(capsys, one, other)
    assert code == 1
    assert "differs first at step 1, in its batch, on rank 0 and 1 more ranks: 0.tokens" in text
    code, text = compare(capsys, one, spoiled)
    assert code == 1
    assert "differs first at step 3, in its gradients, on rank 0 and 1 more ranks: chunk 0: " in text
