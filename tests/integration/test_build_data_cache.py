"""The data cache, built beforehand, is the one that training maps."""

from pathlib import Path

import pytest

from tests.helpers.tool_runs import run_tool, run_tool_here
from tests.helpers.training_runs import train, write_toy_data

pytestmark = pytest.mark.integration


COMMAND = ("tools/build_data_cache.py", "--preset", "hammer-tiny", "--vocab-size", "1000")


def test_training_adds_nothing_to_a_cache_built_beforehand(tmp_path: Path) -> None:
    data, cache = write_toy_data(tmp_path / "data"), tmp_path / "cache"
    flags = ("--seq-length", "64", "--train-iters", "2", "--lr-warmup-iters", "1", "--eval-iters", "1")
    sources = ("--data-path", data, "--data-cache-path", str(cache))
    result = run_tool(*COMMAND, *flags, *sources)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "samples: " in result.stdout
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert files
    tp2 = ("--preset", "hammer-tiny", "--vocab-size", "1000", "--tensor-model-parallel-size", "2")
    train(2, tmp_path / "metrics.jsonl", *tp2, *flags, *sources)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files


def test_a_cache_needs_a_folder_and_data(tmp_path: Path) -> None:
    result = run_tool_here(*COMMAND, "--mock-data")
    assert result.returncode == 2
    assert "data-cache-path: must name the folder" in result.stderr
    result = run_tool_here(*COMMAND, "--data-path", tmp_path / "missing", "--data-cache-path", tmp_path / "cache")
    assert result.returncode == 2
    assert "missing.bin: file does not exist" in result.stderr
    assert not (tmp_path / "cache").exists()
