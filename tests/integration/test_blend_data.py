"""tools/blend_data.py as a user runs it, on pairs of the preprocessor; training's own parser reads what it writes."""

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.pair_writer import IndexedWriter
from megatron_hammer.data.sources import parse_blend
from tests.helpers.indexed_writing import add_document
from tests.helpers.tool_runs import Finished, run_tool

pytestmark = pytest.mark.integration


def run(*arguments: str | Path, cwd: Path) -> Finished:
    return run_tool("tools/blend_data.py", *arguments, cwd=cwd, COLUMNS="160")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, num_tokens in (("large", 9000), ("small", 1000)):
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            for length in (num_tokens // 2, num_tokens // 2):
                add_document(writer, np.ones(length, dtype=np.int64))
    return tmp_path


def test_weights_by_size(folder: Path) -> None:
    code, stdout, stderr = run("large", "tiny=small", cwd=folder)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[-2] == "--data-path 0.9 large 0.1 small"
    assert lines[-1] == "2 sources, 10,000 training tokens"
    assert "tiny" in stdout


def test_a_budget_is_previewed_capped_and_written(folder: Path) -> None:
    budget = ("--train-tokens", "20K", "--seq-length", "100", "--weights", "1", "1")
    code, stdout, stderr = run("large", "small", *budget, "--split", "1,1,0", cwd=folder)
    assert code == 0
    assert "small: is read 20.00 times, more than max_epochs=4. Lower its weight, pass --cap-epochs" in stderr
    assert stdout.splitlines()[-2] == "--data-path 0.5 large 0.5 small --split 1,1,0"
    code, stdout, stderr = run("large", "small", *budget, "--cap-epochs", "--output", "args.txt", "--json", cwd=folder)
    assert (code, stderr) == (0, "")
    result = json.loads(stdout)
    assert result["budget"] == {"num_samples": 200, "seq_length": 100, "num_tokens": 20_000}
    assert [source["drawn"]["num_samples"] for source in result["sources"]] == [160, 40]
    assert result["sources"][1]["drawn"]["epochs"] == pytest.approx(4)
    words = (folder / "args.txt").read_text().split()
    assert words == result["data_path"] == ["0.8", "large", "0.2", "small"]
    sources, problems = parse_blend("data-path", words)
    assert problems == []
    assert [(source.prefix, source.weight) for source in sources] == [("large", 0.8), ("small", 0.2)]


def test_the_printed_line_is_what_a_shell_reads(folder: Path) -> None:
    for suffix in (".bin", ".idx"):
        (folder / f"small{suffix}").rename(folder / f"my data{suffix}")
    code, stdout, _ = run(
        "large", "my data", "--train-iters", "10", "--global-batch-size", "4", "--seq-length", "50", cwd=folder
    )
    assert code == 0
    assert "the run draws 40 samples of 50, 2,000 tokens, 0.200 epochs" in stdout.splitlines()[-1]
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-path", nargs="*")
    assert parser.parse_args(shlex.split(stdout.splitlines()[-2])).data_path == ["0.9", "large", "0.1", "my data"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("none",), "error: none.bin: file does not exist."),
        (("large", "small", "--weights", "1"), "error: weights: must be one for each source, got 1 weights and 2"),
        (("large", "--temperature", "0"), "error: temperature: must be positive and finite, got 0.0."),
        (("large", "--train-iters", "5"), "error: global-batch-size: must be given with --train-iters, got none."),
        (("large", "--train-iters", "5", "--train-tokens", "5"), "error: train-tokens: cannot be combined with"),
        (("large", "--cap-epochs"), "--cap-epochs needs --train-tokens or --train-iters, got cap_epochs=True alone"),
        (("large", "--train-tokens", "1B", "--cap-epochs"), "error: train-tokens: must be at most 36,000, all sources"),
        (
            ("large", "--train-tokens", "1B", "--seq-length", "9000"),
            "error: large: training split must hold one sample",
        ),
        (("large", "--max-epochs", "nan"), "argument --max-epochs: must be a finite number, got 'nan'."),
        (("large", "--train-tokens", "0"), "must be a positive count such as 20000000, 20M or 1.5B, got 0"),
        (("large", "--train-tokens", "many"), "must be a positive count such as 20000000, 20M or 1.5B, got many"),
        (("large", "--split", "a"), "error: split: must be three shares for training, validation and test"),
        (
            ("large", "--max-epochs", "2"),
            "--max-epochs needs --train-tokens or --train-iters, got max_epochs=2.0",
        ),
        (("large", "--output", "small.idx"), "error: small.idx: file must be an earlier result of this command"),
        (("large", "--output", "/dev/null/x"), "error: /dev/null/x: file cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = run(*arguments, cwd=folder)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert "Traceback" not in stderr
