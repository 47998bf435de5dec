"""The profile command refuses to replace files of another origin before it times anything."""

import argparse
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import profile
from megatron_hammer.errors import OutputError


@pytest.mark.parametrize("name", ["coefficients.toml", "gpus.toml", "operators-2.json"])
def test_files_of_another_origin_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# mine")
    parser = argparse.ArgumentParser()
    profile.add_arguments(parser)
    with pytest.raises(OutputError, match=f"{name}: file must be an earlier result of this command"):
        profile.run(parser.parse_args(["--platform", "cpu", "--output-dir", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "# mine"
