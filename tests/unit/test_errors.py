"""How an entry point ends: on a user's error, on Ctrl-C, and on the signal of a scheduler."""

import os
import signal

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
