"""The set-up script, on machines made of fake interpreters. Standard library only; installs nothing."""

import ast
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

SYSTEM_TOOLS = ("bash", "env", "cat", "cksum", "mkdir", "rm", "find", "tail", "awk", "dirname", "flock", "sleep", "cp")

# Answers what the set-up asks of an interpreter: its version, what it lacks, ensurepip, -m venv, -m pip.
FAKE_INTERPRETER = """#!/usr/bin/env bash
self="$(cd "$(dirname "$0")" && pwd)/${{0##*/}}"
case "$*" in
    *version_info*) echo "{version} $self" ;;
    *check_environment.py*)
        if [[ -e "${{self%/*}}/complete" ]]; then exit 0; fi
        printf '%s\\n' {missing}; exit 1 ;;
    "-c import ensurepip"*) exit {ensurepip_exit_code} ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$self" "$3/bin/python" ;;
    "-m pip install"*)
        echo "$*" >>"$PIP_CALLS"; sleep "{install_s}"
        if [[ -e "$PIP_CALLS.fail" ]]; then echo "no network"; exit 1; fi
        echo >"${{self%/*}}/complete" ;;
    "-m pip "*) ;;
esac
"""
FAILING_SHIM = "#!/usr/bin/env bash\necho 'pyenv: command not found' >&2\nexit 127\n"


class Machine:
    """A clone with the set-up scripts and a PATH that holds nothing but our fakes and a few system tools."""

    def __init__(self, folder: Path):
        self.clone = folder / "clone with a space"
        self.bin = folder / "bin"
        self.pip_calls_path = folder / "pip_calls"
        (self.clone / "tools").mkdir(parents=True)
        self.bin.mkdir()
        (folder / "home").mkdir()
        for name in ("setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.clone)
        for name in ("setup_environment.sh", "find_or_make_python.sh", "check_environment.py"):
            shutil.copy(ROOT / "tools" / name, self.clone / "tools")
        for name in SYSTEM_TOOLS:
            path = shutil.which(name)
            if path:
                (self.bin / name).symlink_to(path)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder / "home"),
            "SETUP_SEARCH_DIRS": "",
            "PIP_CALLS": str(self.pip_calls_path),
        }

    def add_interpreter(self, path: Path | str, text: str = "", **fields: object) -> Path:
        path = self.bin / path
        path.parent.mkdir(parents=True, exist_ok=True)
        defaults = {"version": "3.12.1", "missing": "'pytest>=8' rich", "ensurepip_exit_code": 0, "install_s": 0}
        path.write_text(text or FAKE_INTERPRETER.format_map(defaults | fields))
        path.chmod(0o755)
        return path

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd="/",
            env=self.environment | {"ROOT": str(self.clone)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str = '"$ROOT/tools/find_or_make_python.sh"', **environment: str) -> tuple[int, str, str]:
        process = self.start(command, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def venv_python(self) -> str:
        return f"{self.clone}/.venv/bin/python"

    @property
    def num_installations(self) -> int:
        return len(self.pip_calls_path.read_text().splitlines()) if self.pip_calls_path.exists() else 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_picks_the_interpreter_that_works(machine: Machine) -> None:
    machine.add_interpreter("python3.12", FAILING_SHIM)
    machine.add_interpreter("python3", version="3.11.7")
    good_path = machine.add_interpreter("python3.13", version="3.13.0")
    code, out, err = machine.run()
    assert (code, out) == (0, f"{machine.venv_python}\n"), err
    assert f"found Python 3.13.0 ({good_path})" in err
    call = machine.pip_calls_path.read_text()
    assert f"-c {machine.clone}/constraints.txt -e {machine.clone}[dev]" in call


def test_looks_into_pyenv(machine: Machine) -> None:
    path = machine.add_interpreter(Path(machine.environment["HOME"]) / ".pyenv/versions/3.12.1/bin/python")
    code, _, err = machine.run()
    assert code == 0
    assert f"found Python 3.12.1 ({path})" in err


def test_no_interpreter_is_one_message_and_exit_2(machine: Machine) -> None:
    machine.add_interpreter("python3.12", FAILING_SHIM)
    machine.add_interpreter("python3.13", version="3.13.0", ensurepip_exit_code=1)
    machine.add_interpreter("python3", version="3.11.7")
    code, out, err = machine.run()
    assert (code, out) == (2, "")
    assert "a Python 3.12 or 3.13 must be installed, tried:" in err
    assert f"{machine.bin}/python3.12 (does not run)" in err
    assert "apt install python3.13-venv" in err
    assert f"{machine.bin}/python3 (is 3.11.7)" in err
    assert "set PYTHON to its path" in err


def test_no_python_at_all(machine: Machine) -> None:
    code, _, err = machine.run()
    assert code == 2
    assert "tried: nothing, there is no python" in err


def test_complete_interpreter_is_used_untouched(machine: Machine) -> None:
    path = machine.add_interpreter("python3")
    (machine.bin / "complete").touch()
    code, out, err = machine.run()
    assert (code, out) == (0, f"{path}\n")
    assert "untouched" in err
    assert not (machine.clone / ".venv").exists()
    assert machine.num_installations == 0


def test_an_interpreter_that_lacks_a_few_packages_is_left_alone_and_they_are_named(machine: Machine) -> None:
    path = machine.add_interpreter("python3")
    _, out, err = machine.run()
    assert out == f"{machine.venv_python}\n"
    assert (
        f"python3 lacks pytest>=8, rich; leaving it alone. To use it: {path} -m pip install 'pytest>=8' 'rich'\n" in err
    )


def test_second_run_installs_nothing(machine: Machine) -> None:
    machine.add_interpreter("python3.12")
    machine.run()
    code, out, err = machine.run()
    assert (code, out) == (0, f"{machine.venv_python}\n")
    assert err == f"set-up: using .venv ({machine.venv_python})\n"
    assert machine.num_installations == 1


def test_failed_installation_says_so_and_is_completed_next_time(machine: Machine) -> None:
    machine.add_interpreter("python3.12")
    failure = Path(f"{machine.pip_calls_path}.fail")
    failure.touch()
    code, out, err = machine.run()
    assert (code, out) == (2, "")
    assert "no network" in err
    assert "run again: it continues" in err
    failure.unlink()
    code, out, err = machine.run()
    assert (code, out) == (0, f"{machine.venv_python}\n")
    assert "completing .venv" in err


def test_interruption_in_the_middle_is_completed_although_all_packages_show(machine: Machine) -> None:
    machine.add_interpreter("python3.12")
    machine.run()
    (machine.clone / ".venv/setup.stamp").write_text("installing\n")
    half_written = machine.clone / ".venv/lib/python3.12/site-packages/torch-2.15.0.dist-info"
    half_written.mkdir(parents=True)
    code, _, err = machine.run()
    assert code == 0
    assert "completing .venv" in err
    assert not half_written.exists()
    assert machine.num_installations == 2


def test_changed_requirements_are_installed(machine: Machine) -> None:
    machine.add_interpreter("python3.12")
    machine.run()
    with open(machine.clone / "constraints.txt", "a") as constraints:
        constraints.write("other==1\n")
    machine.run()
    assert machine.num_installations == 2
    machine.run()
    assert machine.num_installations == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is missing: install util-linux")
def test_two_at_once_install_once(machine: Machine) -> None:
    machine.add_interpreter("python3.12", install_s=1)
    command = '"$ROOT/tools/find_or_make_python.sh"'
    processes = [machine.start(command), machine.start(command)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in results] == [f"{machine.venv_python}\n"] * 2
    assert sum("waiting for another set-up" in err for _, err in results) == 1
    assert machine.num_installations == 1


def test_sourcing_exports_and_leaves_the_caller_alone(machine: Machine) -> None:
    machine.add_interpreter("python3.12")
    command = """
        set -- --kept; before="$-"
        source "$ROOT/tools/setup_environment.sh"
        [[ "$-" == "$before" && "$*" == --kept && "$PWD" == / && -z "${_hammer_root:-}" ]] || echo changed
        source "$ROOT/tools/setup_environment.sh"
        env
    """
    code, out, err = machine.run(command)
    variables = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    assert code == 0, err
    assert "changed" not in out.splitlines()
    assert variables["PYTHON"] == machine.venv_python
    assert variables["PYTHONPATH"] == str(machine.clone)
    assert variables["PATH"] == f"{machine.clone}/.venv/bin:{machine.bin}"


def test_sourcing_ends_a_strict_caller_with_2(machine: Machine) -> None:
    code, out, _ = machine.run('set -euo pipefail; source "$ROOT/tools/setup_environment.sh"; echo went on')
    assert (code, out) == (2, "")


def run_check(setup_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    check_path = ROOT / "tools" / "check_environment.py"
    command = [sys.executable, str(check_path), "--setup-path", str(setup_path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_check_names_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("packaging", reason="packaging is missing: pip install packaging")
    setup_path = tmp_path / "setup.py"
    setup_path.write_text(
        "import no_such_module\n"
        "PYTHON_REQUIRES = '>=3.12'\n"
        "INSTALL_REQUIRES = ['pytest>=1', 'pytest>=999', 'surely-not-installed[x]>=1']\n"
        "EXTRAS_REQUIRE = {'dev': ['packaging<0']}\n"
    )
    result = run_check(setup_path, "--extra", "dev")
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines() == ["pytest>=999", "surely-not-installed[x]>=1", "packaging<0"]
    assert "must be an extra of setup.py, got gpu" in run_check(setup_path, "--extra", "gpu").stderr


@pytest.mark.parametrize(
    ("python_requires", "is_supported"), [(">=3.12", True), ("<3.99,>=3.12", True), (">=3.99", False), ("<3.12", False)]
)
@pytest.mark.parametrize("flags", [(), ("-S",)], ids=["packaging", "nothing installed"])
def test_check_names_an_unsupported_python_beside_what_is_missing(
    python_requires: str, is_supported: bool, flags: tuple[str, ...], tmp_path: Path
) -> None:
    setup_path = tmp_path / "setup.py"
    setup_path.write_text(
        f"PYTHON_REQUIRES = {python_requires!r}\n"
        "INSTALL_REQUIRES = ['surely-not-installed>=1']\n"
        "EXTRAS_REQUIRE = {}\n"
    )
    command = [sys.executable, *flags, str(ROOT / "tools" / "check_environment.py"), "--setup-path", str(setup_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = [] if is_supported else [f"python{python_requires}"]
    assert (result.returncode, result.stdout.splitlines()) == (1, [*expected, "surely-not-installed>=1"]), result.stderr


def test_check_takes_a_vendors_build_for_its_release(tmp_path: Path) -> None:
    pytest.importorskip("packaging", reason="packaging is missing: pip install packaging")
    vendor = tmp_path / "site" / "vendortorch-2.13.0a0+git.nv26.dist-info"
    vendor.mkdir(parents=True)
    (vendor / "METADATA").write_text("Metadata-Version: 2.1\nName: vendortorch\nVersion: 2.13.0a0+git.nv26\n")
    setup_path = tmp_path / "setup.py"
    setup_path.write_text("PYTHON_REQUIRES = ''\nINSTALL_REQUIRES = ['vendortorch>=2.13,<2.16']\nEXTRAS_REQUIRE = {}\n")
    check_path = ROOT / "tools" / "check_environment.py"
    command = [sys.executable, str(check_path), "--setup-path", str(setup_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_finding_a_ready_venv_takes_under_a_second(machine: Machine) -> None:
    machine.add_interpreter("python3.12")
    machine.run()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    machine.run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which is the waiting time on an idle machine: other work does not change it much.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_tested_versions_are_in_range() -> None:
    requirements = pytest.importorskip("packaging.requirements", reason="packaging is missing: pip install packaging")
    literals = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    for text in literals["INSTALL_REQUIRES"] + literals["EXTRAS_REQUIRE"]["dev"]:
        requirement = requirements.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), f"constraints.txt: {requirement.name}"
    assert not any(name.startswith("apex") for texts in literals["EXTRAS_REQUIRE"].values() for name in texts)
