"""tools/merge_data.py as a user runs it: shards give the bytes of one job, and no incomplete file stays."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.index_format import encode_header
from megatron_hammer.data.indexed.manifest import manifest_path
from megatron_hammer.data.indexed.pair import IndexedWriter, read_index
from tests.helpers.indexed_writing import add_document
from tests.helpers.messages import assert_errors, assert_problems
from tests.helpers.tool_runs import Finished, run_tool, start_tool
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

pytestmark = pytest.mark.integration

WAIT_S = 60
NUM_SHARDS = 3


def run(tool: str, *arguments: str | Path, cwd: Path) -> Finished:
    return run_tool(Path("tools", tool), *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, two files of documents, a job done at once in the same order and shuffled, and the job in shards."""
    folder = tmp_path_factory.mktemp("corpus")
    train_toy_tokenizer(folder)
    texts = [f"{k} {TOY_TEXTS[k % 3] * (k % 5)}" if k % 7 else "" for k in range(60)]
    write_jsonl(folder / "a.jsonl", texts[:45])
    write_jsonl(folder / "b.jsonl", texts[45:])
    flags = ("--input", "a.jsonl", "b.jsonl", "--tokenizer-model", "toy.model", "--append-eod", "--workers", "1")
    jobs = [("whole", ()), ("shuffled", ("--shuffle", "--seed", "77"))]
    jobs += [("parts", ("--shard", f"{k}/{NUM_SHARDS}")) for k in range(NUM_SHARDS)]
    for name, extra in jobs:
        code, _, stderr = run("preprocess_data.py", *flags, *extra, "--output-prefix", f"{name}/c", cwd=folder)
        assert code == 0, stderr
    return folder


def read_bytes(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "manifest.json")]


def test_help_and_flags_that_cannot_be(tmp_path: Path) -> None:
    code, stdout, _ = run("merge_data.py", "-h", cwd=tmp_path)
    assert code == 0
    assert "usage:" in stdout
    required = ("--input", "a", "--output-prefix", "b")
    for flags, message in (
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag"),
        (("--seed", "5"), "--seed needs --shuffle, got seed=5 alone"),
        (("--shuffle", "--seed", "-1"), "--seed must be at least 0, got seed=-1"),
    ):
        code, _, stderr = run("merge_data.py", *required, *flags, cwd=tmp_path)
        assert (code, "Traceback" in stderr) == (2, False)
        assert message in stderr


@pytest.mark.parametrize("source", ["parts", "parts/c-*-of-*_text_document"])
def test_shards_give_the_bytes_of_one_job(corpus_dir: Path, tmp_path: Path, source: str) -> None:
    output = tmp_path / "merged"
    code, stdout, stderr = run("merge_data.py", "--input", source, "--output-prefix", output, cwd=corpus_dir)
    assert (code, stderr) == (0, "")
    assert read_bytes(output) == read_bytes(corpus_dir / "whole" / "c_text_document")
    assert re.fullmatch(
        rf"{output}: 3 parts in; 60 documents, \d+ sequences, [\d,]+ tokens as uint16 out, 0 dropped; [\d.]+ s",
        stdout.strip(),
    )


def test_shards_merged_with_shuffle_give_the_bytes_of_one_shuffled_job(corpus_dir: Path, tmp_path: Path) -> None:
    flags = ("--input", "parts", "--output-prefix", tmp_path / "merged", "--shuffle", "--seed", "77", "--json")
    code, stdout, stderr = run("merge_data.py", *flags, cwd=corpus_dir)
    assert (code, stderr) == (0, "")
    assert read_bytes(tmp_path / "merged") == read_bytes(corpus_dir / "shuffled" / "c_text_document")
    assert read_bytes(tmp_path / "merged") != read_bytes(corpus_dir / "whole" / "c_text_document")
    printed = json.loads(stdout)
    assert printed["manifest"] == json.loads(manifest_path(tmp_path / "merged").read_bytes())
    assert printed["parts"] == [f"parts/c-0000{k}-of-00003_text_document" for k in range(NUM_SHARDS)]
    assert printed["num_documents"] == 60


def test_a_missing_shard_is_a_sentence_and_leaves_nothing(corpus_dir: Path, tmp_path: Path) -> None:
    parts = [f"parts/c-0000{k}-of-00003_text_document" for k in (2, 0)]
    code, stdout, stderr = run(
        "merge_data.py", "--input", *parts, "--output-prefix", tmp_path / "merged", cwd=corpus_dir
    )
    assert (code, stdout) == (2, "")
    assert_errors(stderr, ("input:", "shards 0 to 2 of 3", "got no 1", "--shard", "--input"))
    assert not list(tmp_path.iterdir())


def test_parts_without_manifests_are_merged_with_a_warning(tmp_path: Path) -> None:
    for name in ("b", "a"):
        with IndexedWriter(tmp_path / name, np.dtype(np.int32)) as writer:
            add_document(writer, np.array([ord(name)]))
    code, _, stderr = run("merge_data.py", "--input", "b", "a", "--output-prefix", "merged", cwd=tmp_path)
    assert code == 0
    assert_problems(stderr.splitlines(), ("warning: parts:", "no part has a manifest", "same tokenizer"))
    assert read_index(tmp_path / "merged").tokens.tolist() == [ord("b"), ord("a")]


@pytest.mark.parametrize("flags", [(), ("--shuffle",)])
def test_an_interrupt_leaves_nothing(tmp_path: Path, flags: tuple[str, ...]) -> None:
    write_large_pair(tmp_path / "large")
    process = start_tool("tools/merge_data.py", "--input", "large", "--output-prefix", "merged", *flags, cwd=tmp_path)
    deadline_s = time.monotonic() + WAIT_S
    while not (tmp_path / "merged.bin.partial").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert_errors(stderr, ("interrupted", "incomplete files were removed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.bin", "large.idx"]


def write_large_pair(prefix: Path, num_documents: int = 1000, document_tokens: int = 1 << 20) -> None:
    """2 GB of zeros that take no place on the disk."""
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * num_documents * document_tokens)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(encode_header(np.dtype(np.uint16), num_documents, num_documents))
        file.write(np.full(num_documents, document_tokens, dtype=np.int32).data)
        file.write((np.arange(num_documents) * (2 * document_tokens)).data)
        file.write(np.arange(num_documents + 1).data)
