"""The table of checks: one verdict per check, and whole lines where the output is a file."""

import io

import pytest
from rich.console import Console

from megatron_hammer.checkpoint.verification.print_checks import print_checks
from megatron_hammer.checkpoint.verification.verdicts import CheckRow

ROWS = [
    CheckRow("tensors", "30 of 30 " + 120 * "x", True),
    CheckRow("logits", "differ by 0.3", False),
    CheckRow("tokenizer", "none was written", None),
]


def test_every_check_is_one_line_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks(ROWS)
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row, verdict in zip(ROWS, ("passed", "FAILED", "not done"), strict=True):
        assert [row.check, *row.result.split(), *verdict.split()] in words


def test_a_narrow_terminal_folds_and_loses_nothing() -> None:
    stream = io.StringIO()
    print_checks(ROWS, Console(file=stream, width=60), title="Megatron against transformers")
    text = stream.getvalue()
    assert text.startswith("Megatron against transformers")
    assert text.count("x") == 120
    assert max(map(len, text.splitlines())) <= 60
