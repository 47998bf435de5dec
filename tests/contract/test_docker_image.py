"""The RUN step of docker/Dockerfile, executed by bash with a fake python3. Standard library only."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

# What check_environment.py exits with: first argument of the file `codes`, one line per call.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in
    "-m pip list"*) printf '%s\\n' pip==1 torch==2.13.0a0+nv numpy==2.0 nvidia-nccl-cu13==2 ;;
    *check_environment.py*)
        read -r code <codes; sed -i 1d codes
        if [[ $code == 1 ]]; then echo 'zstandard>=0.23'; fi
        exit "$code" ;;
esac
"""


def run_step(folder: Path, *codes: int) -> tuple[int, list[str]]:
    """The step's exit code and the calls of python3, where check_environment.py exits with `codes`, in turn."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8").replace("/tmp/", f"{folder}/")
    (step,) = re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    shell = re.findall(r'"([^"]+)"', re.search(r"^SHELL \[(.*)\]", text, re.MULTILINE)[1])
    extras = re.search(r'^ARG EXTRAS="(.*)"', text, re.MULTILINE)[1]
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    fake = folder / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "EXTRAS": extras}
    result = subprocess.run([*shell, step.replace("\\\n", "")], cwd=folder, env=environment, timeout=60)
    return result.returncode, (folder / "calls").read_text().splitlines()


def test_missing_packages_are_installed_and_the_gpu_stack_is_kept(tmp_path: Path) -> None:
    code, calls = run_step(tmp_path, 1, 0)
    assert code == 0
    assert calls[2] == calls[-1] == "tools/check_environment.py --extra=dev"
    assert f"-m pip install -c {tmp_path}/held.txt -r {tmp_path}/missing.txt" in calls
    assert (tmp_path / "held.txt").read_text().split() == ["torch==2.13.0a0+nv", "nvidia-nccl-cu13==2"]
    assert (tmp_path / "missing.txt").read_text().split() == ["zstandard>=0.23"]


@pytest.mark.parametrize("codes", [(2,), (1, 1)], ids=["unknown extra", "still missing"])
def test_a_failed_check_fails_the_build(tmp_path: Path, codes: tuple[int, ...]) -> None:
    code, calls = run_step(tmp_path, *codes)
    assert code != 0
    assert sum("check_environment.py" in call for call in calls) == len(codes)
    assert any("missing.txt" in call for call in calls) == (codes[0] == 1)
