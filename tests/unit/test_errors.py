"""How an entry point ends: on a user's error, on Ctrl-C, and on the signal of a scheduler."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError, exit_on_interrupt, exit_on_user_error


def test_every_problem_is_a_line_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def main() -> None:
        raise ConfigError("lr: must be positive, got 0. Pass --lr 1e-3.", "seed: must be an integer, got x. Change it.")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: lr: must be positive, got 0. Pass --lr 1e-3.\nerror: seed: must be an integer, got x. Change it.\n"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC])
def test_a_path_that_the_system_refuses_is_a_sentence(capsys: pytest.CaptureFixture[str], number: int) -> None:
    @exit_on_user_error
    def main() -> None:
        raise OSError(number, os.strerror(number), "some/file")

    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith(f"error: some/file: path must be usable, got: {os.strerror(number)}.")


def test_twin_an_error_without_a_path_and_a_missing_file_are_bugs() -> None:
    for error in (OSError(errno.ENOSPC, "No space left"), FileNotFoundError(errno.ENOENT, "No such file", "x")):

        @exit_on_user_error
        def main(error: OSError = error) -> None:
            raise error

        with pytest.raises(OSError, match="No s"):
            main()


def test_an_argument_that_is_not_utf8_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tool", "--input", os.fsdecode(b"caf\xe9.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        exit_on_user_error(lambda: None)()
    assert "arguments must be UTF-8, got b'caf\\xe9.jsonl'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_that_says_what_is_left(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    old_handler = signal.getsignal(signal.SIGTERM)

    @exit_on_interrupt("nothing was written")
    def main() -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written. Run the same command again.\n"
    assert signal.getsignal(signal.SIGTERM) is old_handler


def test_a_main_that_ends_well_returns_what_it_returned() -> None:
    assert exit_on_interrupt("nothing was written")(exit_on_user_error(lambda number: number + 1))(2) == 3


def run_unread(body: str, *flags: str) -> tuple[int, str]:
    """Exit code and stderr of an entry point whose stdout is a pipe that nobody reads any more."""
    program = (
        "import sys\nfrom megatron_hammer.errors import *\n"
        f"@exit_on_user_error\ndef main():\n    {body}\nsys.exit(main())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [sys.executable, *flags, "-c", program],
            stdout=write_end,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write_end)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("print('short'); return 3", 3),
        ("print('usage: ...'); sys.exit(0)", 0),
        ("print('x' * 1_000_000); return 3", 141),
        ("print('x' * 1_000_000, flush=True); return 3", 141),
    ],
)
def test_a_command_whose_output_nobody_reads_ends_without_a_stack_trace(body: str, code: int) -> None:
    assert run_unread(body) == (code, "")


def test_a_table_that_nobody_reads_is_not_taken_for_a_finding() -> None:
    body = "from megatron_hammer.files.tables import open_console; open_console().print('x'); return 1"
    assert run_unread(body) == (141, "")


def test_unbuffered_output_that_nobody_reads_ends_without_a_stack_trace() -> None:
    assert run_unread("print('short'); return 3", "-u") == (141, "")


def test_a_user_error_is_still_told_where_nobody_reads_the_output() -> None:
    assert run_unread("print('begun'); raise ConfigError('lr: wrong.')") == (2, "error: lr: wrong.\n")


def test_twin_a_broken_pipe_of_our_own_keeps_its_stack_trace() -> None:
    @exit_on_user_error
    def main() -> None:
        raise BrokenPipeError("a pipe between processes")

    with pytest.raises(BrokenPipeError, match="between processes"):
        main()


def test_a_command_without_output_streams_does_its_work(tmp_path: Path) -> None:
    """As under a service manager, or with `>&- 2>&-`."""
    program = """
import sys
from pathlib import Path
from megatron_hammer.errors import exit_on_user_error
@exit_on_user_error
def main():
    with open(sys.argv[1], "w") as file:
        print("to nobody")
        print("to nobody", file=sys.stderr)
        file.write("done")
main()
"""
    command = 'exec "$@" <&- >&- 2>&-'
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    path = str(tmp_path / "file")
    assert (
        subprocess.run(["sh", "-c", command, "sh", sys.executable, "-c", program, path], env=environment).returncode
        == 0
    )
    assert (tmp_path / "file").read_text() == "done"
