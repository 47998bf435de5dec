import contextlib
import gc
import signal
import sys
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.command_line import CommandParser, importing, parse_new_name


def parse(*words: str) -> object:
    parser = CommandParser("Try.")
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=parse_new_name)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("text", "value"), [("-1e-3", -0.001), ("-.5E+2", -50.0), ("-3.", -3.0), ("-1_0", -10.0), ("1e-3", 0.001)]
)
def test_a_negative_number_is_a_value(text: str, value: float) -> None:
    assert parse("--ratio", text).ratio == value  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["nan", "-nan", "inf", "-inf", "-Infinity", "1e999", "three", ""])
def test_a_number_is_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--ratio: must be a finite number, got '{text}'"):
        parse("--ratio", text)


@pytest.mark.parametrize("text", ["9223372036854775808", "-9223372036854775808"])
def test_a_whole_number_has_64_bits(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--steps: must be at most 9223372036854775807, got '{text}'"):
        parse("--steps", text)
    assert parse("--steps", text[:-1]).steps == int(text[:-1])  # type: ignore[attr-defined]


@pytest.mark.parametrize("word", ["-1x", "--1", "-e5", "-infinite"])
def test_other_words_with_a_hyphen_are_flags(word: str) -> None:
    with pytest.raises(ConfigError, match="command line: unrecognized arguments"):
        parse("--names", word)


@pytest.mark.parametrize("text", ["data/", "data/.", "data/..", ".", "..", "/"])
def test_an_output_has_a_name(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--output: must end in a name, got '{text}'. Pass {text.rstrip('/')}/NAME"):
        parse("--output", text)
    assert parse("--folder", text).folder == Path(text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("flag", ["--folder", "--output"])
def test_no_path_is_not_the_current_folder(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: must be a path, got ''"):
        parse(flag, "")
    with pytest.raises(ConfigError, match=f"{flag}: must be a path, got ''"):
        parse(f"{flag}=")


def test_a_list_that_is_given_again_is_longer() -> None:
    parser = CommandParser()
    parser.add_argument("--input", nargs="+", default=["usual"])
    parser.add_argument("--size", type=int, default=1)
    assert parser.parse_args([]).input == ["usual"]
    found = parser.parse_args(["--input", "a", "b", "--size", "2", "--input", "c", "--size", "3"])
    assert (found.input, found.size) == (["a", "b", "c"], 3)
    assert parser.parse_args(["--input", "d"]).input == ["d"], "nothing is left of the call before"


def test_what_is_imported_is_left_out_of_the_search_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)  # another test may have imported it
    num_frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= num_frozen + len(kept)
    finally:
        gc.unfreeze()


def test_with_triton_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would print a line at exit for each of its objects."""
    monkeypatch.setitem(sys.modules, "triton", sys)
    num_frozen = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
    assert gc.get_freeze_count() == num_frozen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", "7"), "--seed needs --shuffle, got seed=7 alone"),
        (("--seed", "1"), "--seed needs --shuffle, got seed=1 alone"),  # its default value, typed
        (("--max-epochs", "2"), "--max-epochs needs --tokens or --num-iters, got max_epochs=2 alone"),
        (("--off",), "--off needs --shuffle, got off=False alone"),
        (("--seed", "7", "--shuffle", "--max-epochs", "2", "--num-iters", "1", "--off"), ""),
        ((), ""),
    ],
)
def test_a_flag_needs_the_one_that_gives_it_an_effect(words: tuple[str, ...], message: str) -> None:
    parser = CommandParser("Try.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-epochs", type=int, default=4)
    parser.add_argument("--off", action="store_false")
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--input", nargs="+", default=["x"])
    for flag in ("--tokens", "--num-iters"):
        parser.add_argument(flag)
    needs = {"seed": "shuffle", "off": "shuffle", "max_epochs": "tokens or num_iters"}
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        parser.refuse_idle((*words, "--input", "a", "b", "--input", "c"), needs)


def test_a_name_that_is_looked_up_is_one_of_the_choices() -> None:
    """As Megatron's parser takes enumerations: --attention-backend, --exit-signal."""
    parser = CommandParser("Try.")
    parser.add_argument("--signal", type=lambda name: signal.Signals[name], choices=list(signal.Signals)[:2])
    parser.add_argument("--kinds", nargs="+", type=lambda name: {"a": 1}[name])
    assert parser.parse_args(["--signal", "SIGINT", "--kinds", "a"]).kinds == [1]
    with pytest.raises(ConfigError, match="argument --signal: must be one of SIGHUP, SIGINT, got '15'"):
        parser.parse_args(["--signal", "15"])
    with pytest.raises(ConfigError, match="argument --kinds: must be a name that it knows, got 'b'"):
        parser.parse_args(["--kinds", "a", "b"])
