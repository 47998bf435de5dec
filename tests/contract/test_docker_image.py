"""The Dockerfiles: what they name exists, their versions agree, and one of their RUN steps runs with a fake python.

Standard library only. What was built for real is in docker/README.md; `.ci/run shell` runs hadolint.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT
from tests.helpers.te_wheel import VERSION as TE_VERSION

DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
CONSTRAINTS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
)
# What check_environment.py exits with: first argument of the file `codes`, one line per call.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in
    *check_environment.py*)
        read -r code <codes; sed -i 1d codes
        if [[ $code == 1 ]]; then echo 'zstandard>=0.23'; fi
        exit "$code" ;;
esac
"""


def read_steps(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, rest in re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)]


def read_dockerfile(name: str) -> list[tuple[str, str]]:
    return read_steps((ROOT / name).read_text(encoding="utf-8"))


def list_copied(steps: list[tuple[str, str]]) -> list[str]:
    """Sources in the clone of every COPY."""
    copies = [rest.split() for word, rest in steps if word == "COPY" and not rest.startswith("--from=")]
    return [source for words in copies for source in words[:-1]]


def is_in_context(source: str, ignore: str) -> bool:
    """Whether .dockerignore, which lists what is let in, lets this file or folder in."""
    assert ignore.splitlines()[1] == "*"
    let_in = [line[1:] for line in ignore.splitlines() if line.startswith("!")]
    return source.split("/")[0] in let_in


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_build(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    sources = list_copied(read_dockerfile(name))
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not is_in_context(source, ignore)] == []
    assert not is_in_context("outputs/key.pem", ignore)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_paths_in_run_steps_were_copied_before(name: str) -> None:
    copied: list[str] = []
    for word, rest in read_dockerfile(name):
        if word == "COPY":
            copied += list_copied([(word, rest)])
        used = re.findall(r"(?<![\w/.-])((?:tools|examples)/[\w./-]+|[\w-]+\.txt)", rest) if word == "RUN" else []
        assert [path for path in used if path not in copied] == [], rest


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_installation_has_the_versions_of_the_constraints(name: str) -> None:
    for word, rest in read_dockerfile(name):
        for call in re.findall(r"pip install ([^;]*)", rest) if word == "RUN" else []:
            assert "-c constraints.txt" in call or call == "--no-deps --no-build-isolation .", call
            words = re.sub(r'-[cr] \S+|--index-url \S+|--[\w-]+|"apex @[^"]*"', "", call).replace('"', "").split()
            packages = [word.split("[")[0].replace("-", "_") for word in words if word != "."]
            known = {package.replace("-", "_") for package in CONSTRAINTS}
            assert [package for package in packages if package not in known] == [], call


def test_versions_that_stand_in_two_places_agree() -> None:
    steps = read_dockerfile("docker/Dockerfile")
    (cuda,) = [rest.split("=")[1] for word, rest in steps if rest.startswith("CUDA_VERSION=")]
    assert cuda.split(".")[:2] == CONSTRAINTS["cuda-toolkit"].split(".")[:2]
    assert {CONSTRAINTS[f"transformer_engine{part}"] for part in ("", "_cu13", "_torch")} == {TE_VERSION}
    # Ubuntu 24.04 has Python 3.12.
    bases = [rest for name in DOCKERFILES for word, rest in read_dockerfile(name) if word == "FROM"]
    assert len(bases) == 4
    assert all(re.search(r"ubuntu:?24\.04", base) for base in bases)
    assert "Python 3.12" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_runs_hammer_as_a_user_without_rights(name: str) -> None:
    steps = read_dockerfile(name)
    (user,) = [rest for word, rest in steps if word == "USER"]
    assert int(user) > 0
    assert f"useradd --uid {user} " in " ".join(rest for word, rest in steps if word == "RUN")
    assert ("ENTRYPOINT", '["hammer"]') in steps
    assert '"hammer = megatron_hammer.cli.hammer:main"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_both_files_build_the_package_in_the_same_steps() -> None:
    """From the check of the requirements on; before it, the GPU image compiles what the CPU has no use for."""
    tails = []
    for name in DOCKERFILES:
        steps = read_dockerfile(name)
        tails.append([step for step in steps[steps.index(("COPY", "setup.py ./")) :] if step[0] in ("COPY", "USER")])
    assert tails[0] == tails[1]


def run_step(name: str, folder: Path, *codes: int) -> tuple[int, list[str]]:
    """The exit code and the calls of python in the step that checks the requirements, which exits with `codes`."""
    steps = read_dockerfile(name)
    (step,) = [rest for word, rest in steps if word == "RUN" and "check_environment.py" in rest]
    command = re.sub(r"--mount=\S+", "", step).replace("/tmp/", f"{folder}/")
    shell = re.findall(r'"([^"]+)"', next(rest for word, rest in steps if word == "SHELL"))
    extras = next(rest for word, rest in steps if word == "ARG" and rest.startswith("EXTRAS="))
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    fake = folder / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "EXTRAS": extras.removeprefix("EXTRAS=").strip('"'),
    }
    result = subprocess.run([*shell, command], cwd=folder, env=environment, timeout=60)
    return result.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("name, flags", [(DOCKERFILES[0], " --extra=gpu"), (DOCKERFILES[1], "")])
def test_missing_packages_are_installed(name: str, flags: str, tmp_path: Path) -> None:
    code, calls = run_step(name, tmp_path, 1, 0)
    assert code == 0
    assert calls[-1] == calls[-3] == f"tools/check_environment.py{flags}"
    assert calls[-2] == f"-m pip install -c constraints.txt -r {tmp_path}/missing.txt"
    assert (tmp_path / "missing.txt").read_text().split() == ["zstandard>=0.23"]


@pytest.mark.parametrize("codes", [(2,), (1, 1)], ids=["unknown extra", "still missing"])
@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_failed_check_fails_the_build(name: str, codes: tuple[int, ...], tmp_path: Path) -> None:
    code, calls = run_step(name, tmp_path, *codes)
    assert code != 0
    assert sum("check_environment.py" in call for call in calls) == len(codes)
    assert any("missing.txt" in call for call in calls) == (codes[0] == 1)


def test_a_stale_dockerfile_is_caught() -> None:
    steps = read_steps("# COPY no\nFROM a\nCOPY tools/gone.py \\\n    setup.py ./\nCOPY --from=build /opt /opt\n")
    assert steps == [("FROM", "a"), ("COPY", "tools/gone.py setup.py ./"), ("COPY", "--from=build /opt /opt")]
    assert list_copied(steps) == ["tools/gone.py", "setup.py"]
    assert not is_in_context("docs/x.md", "# only\n*\n!tools\n")
