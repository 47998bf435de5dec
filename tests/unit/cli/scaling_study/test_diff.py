"""The command: sentences and tables, JSON, files, and files of other kinds refused by name."""

import json
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from tests.helpers.study_commands import run_study, write_projection


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    flags = ("--preset", "hammer-tiny", "--gpu", "a100-sxm-80gb", "--gpus", "1,2", "--top", "2")
    folder = tmp_path_factory.mktemp("studies")
    first = write_projection(folder / "first.json", *flags)
    second = write_projection(folder / "second.json", *flags, "--sharding", "distributed_optimizer")
    return [str(first), str(second)]


def test_the_difference_is_printed_and_written(
    studies: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study("diff", *studies, "--output-dir", str(tmp_path))
    output = capsys.readouterr().out
    assert output.startswith("1 inputs differ.\n1 GPUs: 0.0% time per token, with the same layout.\n")
    assert "study.restrictions.shardings" in output
    assert output.splitlines()[-1].endswith(f" appeared; written to {tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diff.csv", "diff.json", "diff.png"]
    run_study("diff", *studies, "--json")
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "diff.json").read_text(encoding="utf-8")
    document = json.loads(captured.out)
    assert len((tmp_path / "diff.csv").read_text().splitlines()) == 1 + len(document["rows"])


def test_other_files_are_refused_by_name(studies: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"format": "megatron_hammer.scaling.comparison", "format_version": 1}')
    with pytest.raises(ConfigError, match=r"other\.json: format must be .*got 'megatron_hammer\.scaling\.comparison'"):
        run_study("diff", studies[0], str(other))
    other.write_text('{"format": "megatron_hammer.scaling.projection", "format_version": 7}')
    with pytest.raises(ConfigError, match=r"other\.json: format_version must be 1, got 7"):
        run_study("diff", str(other), studies[0])
    with pytest.raises(ConfigError, match=r"nothing\.json: file cannot be read"):
        run_study("diff", studies[0], str(tmp_path / "nothing.json"))
