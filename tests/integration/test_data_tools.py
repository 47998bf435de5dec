"""The data tools as a user runs them: exit codes, messages, and files that exist only when they are complete."""

import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tests.helpers.messages import assert_problems
from tests.helpers.tool_runs import run_tool, without_notes
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

pytestmark = pytest.mark.integration

TOOLS = ("build_machine_corpus.py", "tokenizer_train.py", "preprocess_data.py")


def run(tool: str, *arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    code, stdout, stderr = run_tool(Path("tools", tool), *arguments, cwd=cwd)
    return code, stdout, without_notes(stderr)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("tool", TOOLS)
def test_help_and_unknown_flag(tool: str, tmp_path: Path) -> None:
    code, stdout, _ = run(tool, "-h", cwd=tmp_path)
    assert code == 0
    assert "usage:" in stdout
    code, _, stderr = run(tool, "--no-such-flag", cwd=tmp_path)
    assert code == 2
    assert "Traceback" not in stderr


def test_from_this_machines_text_to_a_data_set(tmp_path: Path) -> None:
    code, stdout, stderr = run(
        "build_machine_corpus.py",
        *("--output", "c.jsonl", "--valid-output", "v.jsonl", "--valid-ratio", "0.1", "--max-bytes", "1000000"),
        cwd=tmp_path,
    )
    assert (code, stderr) == (0, "")
    assert re.fullmatch(r"\d+ documents found, \d+ written, skipped: .* beyond max-bytes.*", stdout.splitlines()[-1])
    code, stdout, stderr = run(
        "tokenizer_train.py",
        *("--input", "c.jsonl", "--output", "t.model", "--vocab-size", "1201", "--max-bytes", "400000"),
        cwd=tmp_path,
    )
    assert (code, stderr) == (0, "")
    assert stdout.startswith("t.model: 1201 pieces from ")
    code, stdout, stderr = run(
        "preprocess_data.py",
        *("--input", "c.jsonl", "--tokenizer-model", "t.model", "--output-prefix", "data/c", "--append-eod"),
        *("--workers", "2"),
        cwd=tmp_path,
    )
    assert (code, stderr) == (0, "")
    dataset = IndexedDataset(str(tmp_path / "data" / "c_text_document"))
    num_documents = len((tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines())
    assert len(dataset) == num_documents
    assert stdout.startswith(f"data/c_text_document: {num_documents} documents in, {num_documents} out, 0 dropped, ")
    assert dataset[0][-1] == 2
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "c_text_document.bin",
        "c_text_document.idx",
        "c_text_document.manifest.json",
    ]


def test_json_output_is_the_manifest(tmp_path: Path, tokenizer_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", TOY_TEXTS)
    arguments = ("--input", "c.jsonl", "--tokenizer-model", tokenizer_path, "--output-prefix", "c", "--json")
    code, stdout, _ = run("preprocess_data.py", *arguments, cwd=tmp_path)
    assert code == 0
    printed = json.loads(stdout)["outputs"]["c_text_document"]
    assert printed == json.loads((tmp_path / "c_text_document.manifest.json").read_bytes())


MAX_ERRORS_LINE = (
    "error: max-errors: at most 0 bad records are allowed, got at least 1 (1 shown). "
    "Repair them, or raise --max-errors to skip such records and list them in the manifest.\n"
)
SUFFIXES = ".jsonl .jsonl.gz .jsonl.zst .json .json.gz .json.zst .txt .txt.gz .txt.zst .parquet"


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    "name, content, expected",
    [
        (
            "malformed.jsonl",
            b'{"text": "a"}\n{"text": \n',
            "error: malformed.jsonl:2: line must be one JSON object, got invalid JSON (Expecting value at column 9). "
            "Repair it, or write one JSON object a line.\n" + MAX_ERRORS_LINE,
        ),
        (
            "key.jsonl",
            b'{"content": "a"}\n',
            'error: key.jsonl:1: field "text" is missing, got keys [content]. Pass --json-keys content.\n'
            + MAX_ERRORS_LINE,
        ),
        (
            "blank.jsonl",
            b'{"text": "a"}\n\n{"text": "b"}\n',
            "error: blank.jsonl:2: line must be one JSON object, got a blank line. Repair or remove it.\n"
            + MAX_ERRORS_LINE,
        ),
        (
            "latin.jsonl",
            b'{"text": "\xe9"}\n',
            "error: latin.jsonl:1: text must be UTF-8, got byte 0xe9 at offset 10. Convert the file with iconv.\n"
            + MAX_ERRORS_LINE,
        ),
        (
            "null.jsonl",
            b'{"text": null}\n',
            'error: null.jsonl:1: field "text" must be a string, got null. Repair or remove it.\n' + MAX_ERRORS_LINE,
        ),
        (
            "surrogate.jsonl",
            b'{"text": "\\ud800"}\n',
            'error: surrogate.jsonl:1: field "text" must be valid Unicode, got the lone surrogate U+D800 at character '
            "0. Repair or remove it.\n" + MAX_ERRORS_LINE,
        ),
        (
            "truncated.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9],
            "error: truncated.jsonl.gz:1: file must be readable to its end, got: Compressed file ended before the "
            "end-of-stream marker was reached. Fetch or write it again; it may be truncated.\n",
        ),
        (
            "truncated.jsonl.zst",
            zstandard.compress(b'{"text": "a"}\n' * 9)[:-5],
            "error: truncated.jsonl.zst:1: file must be readable to its end, got: the file ends inside a zstd frame. "
            "Fetch or write it again; it may be truncated.\n",
        ),
        ("absent.jsonl", None, "error: absent.jsonl: input file does not exist. Check the path.\n"),
        (
            ".",
            None,
            f"error: .: directory must hold a file of type {SUFFIXES}, got none among 0 files. Check the path.\n",
        ),
    ],
)
def test_bad_inputs_say_where_and_leave_nothing(
    tmp_path: Path, tokenizer_path: Path, name: str, content: bytes | None, expected: str, workers: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    arguments = ("--input", name, "--tokenizer-model", tokenizer_path, "--output-prefix", "c", "--workers", workers)
    assert run("preprocess_data.py", *arguments, cwd=tmp_path) == (2, "", expected)
    assert sorted(tmp_path.iterdir()) == before


def test_skipped_records_are_listed(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "the fox"}\n\n')
    arguments = ("--input", "c.jsonl", "--tokenizer-model", tokenizer_path, "--output-prefix", "c", "--max-errors", "1")
    code, stdout, stderr = run("preprocess_data.py", *arguments, cwd=tmp_path)
    assert code == 0
    assert_problems(stderr.splitlines(), ("dropped: c.jsonl:2:", "one JSON object", "got a blank line"))
    assert "2 documents in, 1 out, 1 dropped, 0 empty" in stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ("--workers", "0"),
            "command line: --workers must be at least 1 and --max-errors at least 0, got workers=0, max_errors=0. "
            "See --help.",
        ),
        (("--json-keys", "a", "a"), "command line: --json-keys must be distinct, got a a. See --help."),
        (("--seed", "7"), "command line: --seed needs --shuffle, got seed=7 alone. See --help."),
        (
            ("--keep-sequential-samples", "--shuffle"),
            "command line: --keep-sequential-samples keeps the order of documents, got --shuffle too. See --help.",
        ),
        (
            ("--shard", "4/4"),
            "shard: must be I/N with I from 0 to N - 1, got 4/4. Pass 0/4, 1/4, 2/4 and 3/4 to four runs.",
        ),
        (
            ("--shard", "0/4", "--shuffle"),
            "shuffle: a shard cannot be shuffled alone, got shard=0/4. "
            "Shuffle when merging: merge_data.py --shuffle --seed.",
        ),
    ],
)
def test_bad_flags(tmp_path: Path, tokenizer_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    required = ("--input", "c.jsonl", "--tokenizer-model", tokenizer_path, "--output-prefix", "c")
    code, _, stderr = run("preprocess_data.py", *required, *arguments, cwd=tmp_path)
    assert code == 2
    assert stderr.endswith(f"error: {expected}\n")


@pytest.mark.parametrize(
    "tool, arguments, expected",
    [
        (
            "preprocess_data.py",
            ("--input", "c.jsonl", "--tokenizer-model", "absent", "--output-prefix", "c"),
            "error: absent: tokenizer does not exist. Pass a SentencePiece .model, a tokenizer.json, or its folder.\n",
        ),
        (
            "tokenizer_train.py",
            ("--input", "absent.jsonl", "--output", "t.model"),
            "error: absent.jsonl: input file does not exist. Check the path.\n",
        ),
        (
            "build_machine_corpus.py",
            ("--output", "/dev/null/c.jsonl"),
            "error: /dev/null/c.jsonl: file cannot be written (File exists). Free space, or choose another place.\n",
        ),
    ],
)
def test_missing_files_exit_2_without_a_trace(
    tmp_path: Path, tool: str, arguments: tuple[str, ...], expected: str
) -> None:
    assert run(tool, *arguments, cwd=tmp_path) == (2, "", expected)
