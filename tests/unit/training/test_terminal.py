"""Output of megatron goes into one file per rank; our own output and errors stay in the terminal."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.training import terminal
from megatron_hammer.training.terminal import divert_output, lose_what_is_not_taken

PROGRAM = """
import ctypes, logging, os, sys, warnings
from pathlib import Path
from megatron_hammer.training.terminal import divert_output
print("before")
terminal, log_path = divert_output(eval(sys.argv[1]), 3)
print("from print")
os.write(1, b"from compiled code\\n")
ctypes.CDLL(None).puts(b"from C"); ctypes.CDLL(None).fflush(None)
warnings.warn("from warnings")
logging.getLogger("megatron").info("from logging")
print("to a person", file=terminal)
print(log_path, file=terminal)
print("an error", file=sys.stderr)
"""


def run_program(save_dir: Path | None, **environment: str) -> tuple[str, str, Path]:
    """Returns stdout, stderr and the log's path."""
    argument = "None" if save_dir is None else f"Path({str(save_dir)!r})"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), **environment},
    )
    return result.stdout, result.stderr, Path(result.stdout.splitlines()[-1])


def test_everything_but_errors_is_diverted(tmp_path: Path) -> None:
    stdout, stderr, log_path = run_program(tmp_path, HAMMER_ATTEMPT="7")
    assert log_path == tmp_path / "logs" / "rank-3.log"
    assert stdout.splitlines() == ["before", "to a person", str(log_path)]
    assert stderr == "an error\n"
    log = log_path.read_text()
    assert log.startswith("== attempt 7 of rank 3, ")
    assert f"host {socket.gethostname()}" in log.splitlines()[0]
    for line in ("an error", "from print", "from compiled code", "from C", "from warnings", "from logging"):
        assert log.count(line) == 1, line


def test_a_second_run_appends(tmp_path: Path) -> None:
    for _ in range(2):
        *_, log_path = run_program(tmp_path)
    assert log_path.read_text().count("from print") == 2


def test_without_a_folder_the_log_is_a_temporary_file(tmp_path: Path) -> None:
    *_, log_path = run_program(None, TMPDIR=str(tmp_path), TORCHELASTIC_RUN_ID="run-7")
    assert log_path.parent.parent == tmp_path
    assert log_path.parent.name.endswith("run-7")
    assert "from print" in log_path.read_text()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"save: must be a folder that can be made and written, got .*file/logs"):
        divert_output(tmp_path / "file", 0)


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_a_folder_that_somebody_else_put_there_is_not_used(tmp_path: Path, kind: str) -> None:
    """Its name can be known before the run: a link would append the log to a file of the victim."""
    expected = tmp_path / f"megatron_hammer-{os.getuid()}-run-7"
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "rank-3.log").write_text("precious")
    if kind == "link":
        expected.symlink_to(victim)
    elif kind == "file":
        expected.write_text("")
    else:
        expected.mkdir()
        expected.chmod(0o777)
    *_, log_path = run_program(None, TMPDIR=str(tmp_path), TORCHELASTIC_RUN_ID="run-7")
    assert log_path.parent != expected
    assert log_path.parent.stat().st_mode & 0o077 == 0
    assert "from print" in log_path.read_text()
    assert (victim / "rank-3.log").read_text() == "precious"


def test_a_log_on_a_full_disk_is_lost_and_nothing_else(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a device of Linux that is always full")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-3.log").symlink_to("/dev/full")
    program = PROGRAM.replace('os.write(1, b"from compiled code\\n")', "pass")
    result = subprocess.run(
        [sys.executable, "-c", program, f"Path({str(tmp_path)!r})"],
        capture_output=True, text=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "to a person" in result.stdout
    assert "an error" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_terminal_that_is_gone_is_lost_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        stream = lose_what_is_not_taken(pipe)
        print("nobody reads this", file=stream)
        stream.flush()
        stream.close()


def test_a_launcher_that_asks_for_stacks_ends_no_verbose_rank() -> None:
    program = """
import os, signal
from types import SimpleNamespace
from megatron_hammer.training.pretrain import open_terminal
open_terminal(SimpleNamespace(output=SimpleNamespace(is_verbose=True)))
os.kill(os.getpid(), signal.SIGUSR2)
print("alive")
"""
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "most recent call first" in result.stdout
    assert "alive" in result.stdout


def test_a_pipe_in_the_place_of_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "rank-0.log")
    with pytest.raises(ConfigError, match=r"rank-0\.log: must be a file, got a pipe"):
        divert_output(tmp_path, 0)


def test_a_reader_that_does_not_read_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.05)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        stream = lose_what_is_not_taken(pipe)
        for number in range(3000):  # far more than a pipe holds
            print(f"step {number} {'x' * 60}", file=stream)
        taken = os.read(reader, 1 << 20)
        print("again", file=stream)
        after = os.read(reader, 1 << 20).decode()
        stream.close()
    os.close(reader)
    assert taken.startswith(b"step 0 ")
    assert b"step 2999" not in taken
    assert after == "\nwarning: nothing was read here for a time, and what was printed meanwhile is lost.\nagain\n"
