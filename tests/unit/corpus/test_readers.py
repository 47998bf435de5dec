"""Every input format gives every document, and every bad record has a message with its place."""

import gzip
import json
import os
import re
import struct
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_hammer.corpus import parquet_rows, readers
from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.corpus.readers import Document, read_documents
from megatron_hammer.errors import DataError
from tests.helpers.messages import assert_problem, assert_problems

TEXTS = ["first", "第二\n行", "", "a\x00b", 'quote " and \\']


def to_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def read_texts(*inputs: Path | str) -> list[str]:
    return [document.text for document in read_documents(inputs)]


def error_of(*inputs: Path | str, key: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(inputs, key))
    return str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", to_jsonl(TEXTS)),
        ("a.JSONL", to_jsonl(TEXTS)),
        ("a.json", to_jsonl(TEXTS)),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + to_jsonl(TEXTS)),
        ("a.jsonl", to_jsonl(TEXTS).replace(b"\n", b"\r\n")),
        ("a.jsonl", to_jsonl(TEXTS)[:-1]),
        ("a.jsonl.gz", gzip.compress(to_jsonl(TEXTS[:2]), mtime=0) + gzip.compress(to_jsonl(TEXTS[2:]), mtime=0)),
        ("a.jsonl.zst", zstandard.compress(to_jsonl(TEXTS[:2])) + zstandard.compress(to_jsonl(TEXTS[2:]))),
        ("a.json.zst", zstandard.compress(json.dumps([{"text": text} for text in TEXTS]).encode())),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == TEXTS


def test_documents_say_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(to_jsonl(TEXTS))
    assert next(iter(read_documents([path]))) == Document("first", str(path), 1)
    assert [document.line for document in read_documents([path])] == [1, 2, 3, 4, 5]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"document {number}" for number in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"url": ["u"] * 2500, "text": texts}), path, row_group_size=700)
    assert read_texts(path) == texts
    assert_problem(
        error_of(path, key="body"), f"{path}:1:", 'field "body" is missing', "got keys [url, text]", "--json-keys text"
    )


def test_null_in_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    assert_problem(error_of(path), f"{path}:2:", 'field "text" must be a string', "got null")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "Zeile 1\n\nZeile 3 ü\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_texts(tmp_path / "a.txt", tmp_path / "b.txt.gz") == [text, text]


def test_directories_and_globs_are_sorted_and_say_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(to_jsonl([name]))
    found = find_input_files([tmp_path])
    assert [path.name for path in found.files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert found.ignored == (tmp_path / "notes.md",)
    assert read_texts(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert read_texts(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_bytes_read_add_up_to_the_size_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(["x" * 1000] * 50))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(to_jsonl(["y"] * 50)))
    counts: list[int] = []
    assert len(list(read_documents([tmp_path], "text", counts.append))) == 100
    assert sum(counts) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_line_longer_than_the_buffer_is_read_whole(tmp_path: Path) -> None:
    text = "汉x" * 1_000_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(to_jsonl(["a", text, "b"])))
    assert read_texts(tmp_path) == ["a", text, "b"]


def test_nan_and_long_integers_are_accepted_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN, "id": 123456789012345678901234567890}\n')
    assert read_texts(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "line, message",
    [
        (
            b'{"text": "cut off',
            "line must be one JSON object, got invalid JSON (Unterminated string starting at column 10). "
            "Repair it, or write one JSON object a line.",
        ),
        (
            b'{"text": "a"} {"text": "b"}',
            "line must be one JSON object, got invalid JSON (Extra data at column 15). "
            "Repair it, or write one JSON object a line.",
        ),
        (b"", "line must be one JSON object, got a blank line. Repair or remove it."),
        (b"  \t\r", "line must be one JSON object, got a blank line. Repair or remove it."),
        (b'["a"]', "line must be one JSON object, got a list. Repair or remove it."),
        (b'"a"', "line must be one JSON object, got a string. Repair or remove it."),
        (b'{"text": "\xff\xfe"}', "text must be UTF-8, got byte 0xff at offset 10. Convert the file with iconv."),
        (
            b'{"url": "u", "content": "longer", "n": 3}',
            'field "text" is missing, got keys [url, content, n]. Pass --json-keys content.',
        ),
        (b'{"n": 3}', 'field "text" is missing, got keys [n]. Repair or remove it.'),
        (b'{"text": null}', 'field "text" must be a string, got null. Repair or remove it.'),
        (b'{"text": 3.5}', 'field "text" must be a string, got a number. Repair or remove it.'),
        (b'{"text": ["a"]}', 'field "text" must be a string, got a list. Repair or remove it.'),
        (
            b'{"text": "ab\\ud800"}',
            'field "text" must be valid Unicode, got the lone surrogate U+D800 at character 2. Repair or remove it.',
        ),
    ],
)
def test_bad_lines_are_named_with_file_line_and_cause(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(to_jsonl(["good", "good"]) + line + b"\n" + to_jsonl(["good"]))
    assert error_of(path) == f"{path}:3: {message}"


def test_an_element_of_an_array_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, 7]')
    assert_problem(error_of(tmp_path / "a.json"), f"{tmp_path}/a.json:2:", "line must be one JSON", "got a number")


def test_inputs_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.bin").touch()
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.jsonl").touch()
    messages = error_of(
        tmp_path / "absent.jsonl",
        f"{tmp_path}/*.csv",
        tmp_path / "empty",
        tmp_path / "a.pdf",
        tmp_path / "a.jsonl",
        f"{tmp_path}/*.jsonl",
    ).split("\n")
    suffixes = ".jsonl .jsonl.gz .jsonl.zst .json .json.gz .json.zst .txt .txt.gz .txt.zst .parquet"
    assert_problems(
        messages,
        (f"{tmp_path}/absent.jsonl:", "input file does not exist"),
        (f"{tmp_path}/*.csv:", "pattern must match a file", "got none"),
        (f"{tmp_path}/empty:", "directory must hold a file", suffixes, "got none among 1 files"),
        (f"{tmp_path}/a.pdf:", f"file type must be one of {suffixes}", "got .pdf"),
        (f"{tmp_path}/a.jsonl:", "file must be named once", f"got it from {tmp_path}/a.jsonl and {tmp_path}/*.jsonl"),
    )


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert_problem(
        error_of(tmp_path / "a.jsonl"), f"{tmp_path}/a.jsonl:", "input must be a regular", "got a pipe or a device"
    )


LINES = to_jsonl(["x"] * 9)
MAYBE_TRUNCATED, OTHER_CONTENT, LARGE_WINDOW = "may be truncated", "Name it after what it holds", "zstd --long=27"
# A frame header whose window is 2^36 bytes, and an empty block.
HUGE_WINDOW = bytes.fromhex("28b52ffd 00") + bytes([(36 - 10) << 3]) + bytes.fromhex("010000")
SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 5) + b"hello"


@pytest.mark.parametrize(
    "name, content, cause, remedy",
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "ended before the end-of-stream marker", MAYBE_TRUNCATED),
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0) + gzip.compress(LINES, mtime=0)[:5],
            "Compressed file ended",
            MAYBE_TRUNCATED,
        ),
        ("a.jsonl.gz", b"", "the file is empty", MAYBE_TRUNCATED),
        ("a.txt.zst", b"", "the file is empty", MAYBE_TRUNCATED),
        ("a.jsonl.gz", LINES, "Not a gzipped file", OTHER_CONTENT),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0) + b"garbage", "Not a gzipped file", OTHER_CONTENT),
        ("a.jsonl.gz", zstandard.compress(LINES), "Not a gzipped file", OTHER_CONTENT),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-5], "the file ends inside a zstd frame", MAYBE_TRUNCATED),
        ("a.jsonl.zst", zstandard.compress(LINES) * 2 + b"\x28", "the file ends inside", MAYBE_TRUNCATED),
        ("a.jsonl.zst", LINES, "Unknown frame descriptor", OTHER_CONTENT),
        ("a.jsonl.zst", zstandard.compress(LINES) + b"garbage", "Unknown frame descriptor", OTHER_CONTENT),
        ("a.jsonl.zst", HUGE_WINDOW, "too much memory", LARGE_WINDOW),
    ],
)
def test_broken_archives_are_errors(tmp_path: Path, name: str, content: bytes, cause: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert re.match(rf"{re.escape(str(tmp_path / name))}:\d+: file must be readable to its end, got: ", message)
    assert cause in message
    assert remedy in message


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_every_window_that_zstd_writes_is_read(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    # Through stdin, so that zstd does not know the size and names the whole window in the frame.
    command = ["zstd", "-q", f"--long={window_log}", "-o", str(path)]
    try:
        subprocess.run(command, input=LINES, check=True)
    except FileNotFoundError:
        pytest.skip("zstd, the command, is not installed: apt-get install zstd")
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    assert read_texts(path) == ["x"] * 9


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0) + b"\0" * 512),  # padded, as on a tape
        ("a.jsonl.gz", gzip.compress(b"", mtime=0) + gzip.compress(LINES, mtime=0) + gzip.compress(b"", mtime=0)),
        ("a.jsonl.zst", SKIPPABLE_FRAME + zstandard.compress(LINES) + SKIPPABLE_FRAME),  # as pzstd writes them
        ("a.jsonl.zst", zstandard.compress(b"") + zstandard.compress(LINES) + zstandard.compress(b"")),
    ],
)
def test_all_that_the_formats_allow_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == ["x"] * 9


def test_an_archive_of_nothing_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b""))
    assert read_texts(tmp_path) == []


def test_a_parquet_file_with_a_large_footer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 300}), path, row_group_size=1)
    assert read_texts(path) == ["x"] * 300
    # The limits are really passed on: with small ones the same footer is refused.
    monkeypatch.setattr(parquet_rows, "THRIFT_LIMITS", {"thrift_container_size_limit": 100})
    assert "Exceeded size limit" in error_of(path)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    assert error_of(tmp_path).startswith(f"{tmp_path}/a.parquet: file must be Parquet, got one that does not parse")


@pytest.mark.parametrize(
    "content, cause",
    [
        ('[{"text": "a"},\n', "the array has no end"),
        ('[{"text": "a"}, {"text": "b', "the array has no end"),
        ('[{"text": "a"}] {"text": "b"}', "something follows the array"),
    ],
)
def test_a_broken_json_array_is_named(tmp_path: Path, content: str, cause: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert_problem(error_of(tmp_path), f"{tmp_path}/a.json:", "file must be one JSON", f"got invalid JSON ({cause})")


def test_strings_that_are_not_utf8_in_parquet_are_named(tmp_path: Path) -> None:
    column = pyarrow.array([b"good", b"\xff bad"], pyarrow.binary())
    pyarrow.parquet.write_table(
        pyarrow.table({"text": column.cast(pyarrow.string(), safe=False)}), tmp_path / "a.parquet"
    )
    assert_problem(error_of(tmp_path), f"{tmp_path}/a.parquet:2:", "text must be UTF-8", "got byte 0xff at offset 0")


def test_a_column_of_which_there_are_two_is_refused(tmp_path: Path) -> None:
    twins = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twins, tmp_path / "a.parquet")
    assert error_of(tmp_path).startswith(f"{tmp_path}/a.parquet: column text must be there once, got it 2 times.")


def test_a_flipped_bit_in_a_page_with_a_checksum_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"document {number}" for number in range(99)]})
    pyarrow.parquet.write_table(table, path, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"document 50")] ^= 1
    path.write_bytes(content)
    assert_problem(error_of(path), f"{path}:1:", "file must be readable to its end", "CRC checksum verification failed")


def test_bytes_in_parquet_are_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["é".encode(), b"b"]}), tmp_path / "a.parquet")
    assert read_texts(tmp_path) == ["é", "b"]


def test_empty_documents_end_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_CHARS", 3)
    documents = [Document(text, "a.jsonl", line) for line, text in enumerate(("abcde", "", "", "", "a"), start=1)]
    batches = list(readers.batch_documents(iter(documents)))
    assert [[document.line for document in batch] for batch in batches] == [[1], [2, 3, 4], [5]]
