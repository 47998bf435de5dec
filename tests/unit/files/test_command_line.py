import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.command_line import CommandParser


def parse(*words: str) -> object:
    parser = CommandParser("Try.")
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--names", nargs="*")
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
