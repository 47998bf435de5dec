"""The measure command refuses what it could not measure, or must not replace, before it trains anything."""

from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import measure
from megatron_hammer.cli.scaling_study.main import parse_arguments
from megatron_hammer.errors import ConfigError, OutputError


def test_a_table_of_another_origin_stays(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("model,seconds\nmine,1.5\n")
    words = ("measure", "--platform", "cpu", "--presets", "hammer-tiny", "--output-dir", str(tmp_path))
    arguments = parse_arguments(words)
    with pytest.raises(OutputError, match=r"runs\.csv: file must be an earlier result of this command"):
        arguments.run(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert table.read_text() == "model,seconds\nmine,1.5\n"


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "find_gpus", lambda platform: ["NVIDIA H100 80GB HBM3"] * 2)
    words = ("measure", "--presets", "hammer-tiny", "--layouts", "single,tp2-dp2", "--output-dir", str(tmp_path))
    arguments = parse_arguments(words)
    with pytest.raises(ConfigError, match="layouts: must need at most the 2 GPUs of this machine, got 4 processes"):
        arguments.run(arguments)
    assert list(tmp_path.iterdir()) == []
