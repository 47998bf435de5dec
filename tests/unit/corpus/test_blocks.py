"""Blocks hold every document once, from any position, and in exactly one slice of a file."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_hammer.corpus.blocks import (
    Block,
    FileSlice,
    Position,
    count_records_before,
    decode_block,
    is_cuttable,
    read_blocks,
    select_whole_files,
)
from tests.helpers.messages import assert_problems

TEXTS = [f"document {number} {'é' * (number * 7 % 50)}\n" for number in range(300)]
BLOCK_BYTES = 1500
START = Position()


def write_files(folder: Path) -> list[Path]:
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[:-1])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "e.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(300), "text": TEXTS}), folder / "f.parquet", row_group_size=70
    )
    (folder / "g.txt").write_text(TEXTS[7])
    return sorted(folder.iterdir())


def texts_of(blocks: list[Block]) -> list[str]:
    return [text for block in blocks for text in decode_block(block, ["text"]).columns[0]]


def read(slices, start: Position = START, counts: list[int] | None = None) -> list[Block]:
    count = (counts if counts is not None else []).append
    return list(read_blocks(slices, ["text"], start=start, on_bytes_read=count, block_bytes=BLOCK_BYTES))


def test_every_document_is_in_one_block(tmp_path: Path) -> None:
    slices = select_whole_files(write_files(tmp_path))
    blocks = read(slices)
    assert texts_of(blocks) == TEXTS * 6 + [TEXTS[7]]
    assert len(blocks) > 50
    numbers = [(block.begin.num_records, block.end.num_records) for block in blocks if block.begin.file_index == 2]
    assert [begin for begin, _ in numbers] == [0, *(end for _, end in numbers[:-1])]


def test_reading_continues_from_any_position(tmp_path: Path) -> None:
    slices = select_whole_files(write_files(tmp_path))
    blocks = read(slices)
    total_bytes = sum(part.size_bytes for part in slices)
    for done in range(len(blocks)):
        counts: list[int] = []
        rest = read(slices, blocks[done].end, counts)
        assert not any(decode_block(block, ["text"]).problems for block in rest)
        assert texts_of(rest) == texts_of(blocks[done + 1 :])
        assert [block.end for block in rest[-1:]] == [block.end for block in blocks[done + 1 :][-1:]]
        look_ahead_bytes = slices[4].size_bytes  # the start of a .json is read to see what it is
        assert total_bytes - 20 <= sum(counts) <= total_bytes + look_ahead_bytes


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl", "f.parquet"])
@pytest.mark.parametrize("num_slices", [2, 3, 7, 500, 30_000])
def test_slices_share_a_file_without_overlap(tmp_path: Path, name: str, num_slices: int) -> None:
    write_files(tmp_path)
    path = tmp_path / name
    size_bytes = path.stat().st_size
    bounds = [size_bytes * n // num_slices for n in range(num_slices + 1)]
    if num_slices == 30_000:  # every byte is a bound somewhere; look at some of them
        bounds = sorted({0, size_bytes, *range(0, min(size_bytes, 3000))})
    texts: list[str] = []
    for start, end in itertools.pairwise(bounds):
        part = FileSlice(path, start, end, is_whole=False)
        blocks = read([part])
        if blocks:
            assert count_records_before(part) == len(texts)
        texts += texts_of(blocks)
    assert texts == TEXTS


def test_which_formats_can_be_cut_into_blocks(tmp_path: Path) -> None:
    names = [path.name for path in write_files(tmp_path) if is_cuttable(path)]
    assert names == ["a.jsonl", "b.jsonl", "f.parquet"]
    (tmp_path / "lines.json").write_text('{"text": "a"}\n')
    assert is_cuttable(tmp_path / "lines.json")


def test_bad_records_are_placed_in_their_block(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": 1}\n{"text": "b"}\n')
    (block,) = read(select_whole_files([tmp_path / "a.jsonl"]))
    decoded = decode_block(block, ["text"])
    assert decoded.columns == (["a", "b"],)
    assert [record for record, _ in decoded.problems] == [1, 2]
    assert_problems(
        [problem for _, problem in decoded.problems],
        ("line", "one JSON object", "got a blank line"),
        ('field "text"', "string", "got a number"),
    )


def test_rows_of_very_different_sizes_come_in_bounded_blocks(tmp_path: Path) -> None:
    texts = [("x" * 200_000 if 300 <= n < 340 else "x") + str(n) for n in range(4000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    slices = select_whole_files([tmp_path / "a.parquet"])
    blocks = list(read_blocks(slices, ["text"], block_bytes=100_000))
    assert texts_of(blocks) == texts
    assert max(len(block.payload) for block in blocks) < 250_000
    for done in range(0, len(blocks), 5):
        assert texts_of(list(read_blocks(slices, ["text"], start=blocks[done].end))) == texts_of(blocks[done + 1 :])
