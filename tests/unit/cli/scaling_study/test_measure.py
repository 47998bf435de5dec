"""The measure command refuses to replace a table of another origin before it trains anything."""

from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study.main import parse_arguments
from megatron_hammer.errors import OutputError


def test_a_table_of_another_origin_stays(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("model,seconds\nmine,1.5\n")
    words = ("measure", "--platform", "cpu", "--presets", "hammer-tiny", "--output-dir", str(tmp_path))
    arguments = parse_arguments(words)
    with pytest.raises(OutputError, match=r"runs\.csv: file must be an earlier result of this command"):
        arguments.run(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert table.read_text() == "model,seconds\nmine,1.5\n"
