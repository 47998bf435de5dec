"""The wheel, installed without the clone: the command, its package data, and a first tool."""

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_hammer import __version__
from megatron_hammer.cli.check_environment import Requirements, read_setup
from tests.helpers.imports import PACKAGE
from tests.helpers.repository import ROOT, list_tracked_files

pytestmark = pytest.mark.integration

TIMEOUT_S = 120


class Installation(NamedTuple):
    """An environment with the wheel, and an empty folder to work in."""

    wheel_path: Path
    bin: Path
    folder: Path

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run(self.bin / program, *arguments, cwd=self.folder)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Nothing is downloaded: the build uses the installed setuptools, and the dependencies are those of the tests."""
    pytest.importorskip("setuptools", reason="setuptools is missing; bash tests/run.sh installs it")
    root = tmp_path_factory.mktemp("wheel")
    source, environment, folder = root / "source", root / "environment", root / "empty"
    for name in list_tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", root, ".", cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel_path,) = root.glob("*.whl")
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=root).returncode == 0
    python = environment / "bin" / "python"
    installed = run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel_path, cwd=root)
    assert installed.returncode == 0, installed.stderr
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return Installation(wheel_path, python.parent, folder)


def test_the_wheel_has_every_file_of_the_package(installation: Installation) -> None:
    tracked = {name for name in list_tracked_files() if name.startswith(f"{PACKAGE}/")}
    assert tracked - set(zipfile.ZipFile(installation.wheel_path).namelist()) == set()


def test_the_command_and_the_version(installation: Installation) -> None:
    result = installation.run("hammer", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "preprocess-data" in result.stdout
    assert installation.run("hammer", "--version").stdout == f"hammer {__version__}\n"
    program = f"import {PACKAGE}; print({PACKAGE}.__version__, {PACKAGE}.__file__)"
    version, path = installation.run("python", "-c", program).stdout.split()
    assert version == __version__
    assert Path(path).is_relative_to(installation.bin.parent)


def test_the_environment_is_checked_against_the_installed_requirements(installation: Installation) -> None:
    program = "import json; from megatron_hammer.cli.check_environment import *; print(json.dumps(read_installed()))"
    installed = Requirements(*json.loads(installation.run("python", "-c", program).stdout))
    expected = read_setup(ROOT / "setup.py")
    assert SpecifierSet(installed.python) == SpecifierSet(expected.python)
    assert list(map(Requirement, installed.packages)) == list(map(Requirement, expected.packages))
    assert installed.extras.keys() == expected.extras.keys()
    for extra, requirements in expected.extras.items():
        assert list(map(Requirement, installed.extras[extra])) == list(map(Requirement, requirements))
    result = installation.run("hammer", "check-environment", "--extra", "dev")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_text_becomes_training_data(installation: Installation) -> None:
    words = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "en", "ill", "ore", "um")]
    lines = [" ".join(words[(i * step) % len(words)] for i in range(1, 30)) for step in range(1, 40)]
    corpus = "".join(f'{{"text": "{line}"}}\n' for line in lines)
    (installation.folder / "corpus.jsonl").write_text(corpus)
    flags = ("--input", "corpus.jsonl", "--output", "t.model", "--vocab-size", "300")
    result = installation.run("hammer", "tokenizer", "train", *flags)
    assert result.returncode == 0, result.stderr
    flags = (
        "--input",
        "corpus.jsonl",
        "--tokenizer-model",
        "t.model",
        "--output-prefix",
        "data/corpus",
        "--workers",
        "2",
    )
    result = installation.run("hammer", "preprocess-data", *flags)
    assert result.returncode == 0, result.stderr
    assert "39 documents in, 39 out, 0 dropped" in result.stdout
    assert (installation.folder / "data/corpus_text_document.bin").stat().st_size > 0


def test_package_data_is_found(installation: Installation) -> None:
    flags = ("--preset", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "8", "--output-dir", "study")
    result = installation.run("hammer", "scaling-study", "project", *flags)
    assert result.returncode == 0, result.stderr
    assert (installation.folder / "study" / "report.html").is_file()
    result = installation.run("hammer", "scaling-study", "validate")
    assert result.returncode == 0, result.stderr
    assert "rows: " in result.stdout.splitlines()[-1]
