"""Samples are uniform, keep their order, and share their bytes by weight."""

import random
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.tokenizer.vocabulary.text_sample import (
    TextSource,
    count_fitting_bytes,
    cut_line,
    parse_sources,
    sample_sources,
    sample_within,
)
from tests.helpers.toy_tokenizer import write_jsonl


def sample(sources: list[TextSource], max_bytes: int | None, seed: int = 7):
    return sample_sources(sources, json_key="text", max_bytes=max_bytes, max_line_bytes=64, seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "a.jsonl", [f"a{number:04d}\n" * 3 for number in range(900)])  # 13,500 bytes in lines
    write_jsonl(tmp_path / "b.jsonl", [f"b{number:04d}" for number in range(700)])  # 3,500 bytes
    return tmp_path


def test_sources_are_written_as_megatrons_blends() -> None:
    assert parse_sources(["x", "y"]) == (TextSource(inputs=("x", "y")),)
    assert parse_sources(["0.7", "x", "y", "3e-1", "z"]) == (
        TextSource(inputs=("x", "y"), weight=0.7),
        TextSource(inputs=("z",), weight=0.3),
    )
    assert parse_sources(["30", "x"])[0].name == "x"
    assert parse_sources(["x", "y", "z"])[0].name == "x and 2 more"


@pytest.mark.parametrize(
    "items, message",
    [
        (["x", "2", "y"], r"either every source has a weight or none, got x without one. Put a weight before it."),
        (["0", "x"], r"weight must be a positive number, got 0. Use a share or a ratio such as 0.7."),
        (["-2", "x"], r"weight must be a positive number, got -2"),
        (["inf", "x", "nan", "y"], r"got inf. Use a share .*\n.*got nan"),
        (["1", "x", "2"], r"weight must stand before a path, got 2 before none. Add the path."),
        (["1", "2", "x"], r"weight must stand before a path, got 1 before none"),
        (["1"], r"weight must stand before a path, got 1 before none"),
    ],
)
def test_wrong_weights_are_named(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sources(items)


def test_a_path_that_reads_as_a_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "30").mkdir()
    with pytest.raises(ConfigError, match=r"must be a weight or a path, got 30, which is both. Write ./30 for the"):
        parse_sources(["30", "x"])


def test_each_source_gives_its_share(folder: Path) -> None:
    sources = [TextSource(inputs=(folder / "a.jsonl",), weight=3), TextSource(inputs=(folder / "b.jsonl",), weight=1)]
    lines, (first, second) = sample(sources, 4000)
    assert (first.sampled_bytes, second.sampled_bytes) == (3000, 1000)
    assert (first.num_documents, second.num_documents) == (900, 700)
    assert (first.text_bytes, second.text_bytes) == (900 * 18, 700 * 5)
    assert sum(map(len, lines)) == 4000
    assert lines == sorted(lines)
    assert (first.shortfall_bytes, second.shortfall_bytes) == (0, 0)
    assert lines == sample(sources, 4000)[0]
    assert lines != sample(sources, 4000, seed=8)[0]


def test_a_source_that_is_too_small_is_used_whole(folder: Path) -> None:
    sources = [TextSource(inputs=(folder / "a.jsonl",), weight=1), TextSource(inputs=(folder / "b.jsonl",), weight=1)]
    _, (first, second) = sample(sources, 10_000)
    assert (first.sampled_bytes, second.sampled_bytes) == (5000, 3500)
    assert (second.is_used_whole, second.shortfall_bytes, first.shortfall_bytes) == (True, 1500, 0)
    fitting_bytes = count_fitting_bytes((first, second))
    assert fitting_bytes == 7000
    assert [count.sampled_bytes for count in sample(sources, fitting_bytes)[1]] == [3500, 3500]
    assert sum(map(len, sample(sources, None)[0])) == 13_500 + 3_500


def test_a_file_in_two_sources_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl: file must be named once"):
        sample([TextSource(inputs=(folder,)), TextSource(inputs=(folder / "a.jsonl",))], 100)


def test_sample_keeps_order_and_limit() -> None:
    lines = [b"%04d" % number for number in range(1000)]
    part = sample_within(lines, len, max_bytes=402, seed=3)
    assert len(part) == 100
    assert part == sorted(part)
    assert part == sample_within(iter(lines), len, max_bytes=402, seed=3)
    assert part != sample_within(lines, len, max_bytes=402, seed=4)
    assert 300 < sum(int(line) for line in part) / len(part) < 700  # not the head, not the tail
    assert sample_within(lines, len, max_bytes=10**9, seed=3) == lines


def test_long_and_short_lines_are_sampled_alike() -> None:
    """A line that no longer fits closes the sample: filling the gap with shorter ones would favour them."""
    lines = [b"x" * (1 if number % 2 else 60) for number in range(4000)]
    part = [line for seed in range(20) for line in sample_within(lines, len, max_bytes=2000, seed=seed)]
    num_long = sum(len(line) == 60 for line in part)
    assert 0.45 < num_long / len(part) < 0.55


@pytest.mark.parametrize("line", [b"", b"short", b"some words " * 30, "汉字没有空格".encode() * 20, b"x" * 200])
def test_cut_lines_are_whole_characters_and_lose_nothing(line: bytes) -> None:
    pieces = list(cut_line(line, 64))
    assert b"".join(pieces) == line
    assert all(len(piece) <= 64 and piece.decode("utf-8") is not None for piece in pieces)


def test_a_short_item_does_not_take_the_room_of_a_longer_one_that_was_dropped() -> None:
    sizes = [1, 90] * 200
    kept = set(sample_within(range(len(sizes)), sizes.__getitem__, max_bytes=1000, seed="7"))
    generator = random.Random("7")
    draws = [generator.random() for _ in sizes]
    assert max(draws[number] for number in kept) < min(draws[number] for number in range(400) if number not in kept)
