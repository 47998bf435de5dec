"""A journal is read back as it was written; another job, a damaged file and a second run are refused."""

import dataclasses
import multiprocessing
import os
import re
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_hammer.corpus.blocks import Position
from megatron_hammer.data.indexed.manifest import JobShard, Manifest, TokenizerIdentity
from megatron_hammer.data.indexed.pair_writer import WriterState
from megatron_hammer.data.preprocess.journal import (
    InputState,
    Job,
    Journal,
    lock_outputs,
    read_journal,
    refuse_other_job,
    write_journal,
)
from megatron_hammer.errors import DataError, OutputError
from tests.helpers.messages import assert_problem, assert_problems, raises_problem

JOB = Job(
    flags={"json_keys": ["text"], "append_eod": True, "seed": None},
    tokenizer_sha256="ab" * 32,
    shard=JobShard(1, 4),
    inputs=(InputState("a.jsonl", 10, 111), InputState("b.jsonl", 20, 222)),
    tool_version="0.1",
)
JOURNAL = Journal(
    job=JOB,
    phase="encode",
    position=Position(1, 234, 5),
    writers=(WriterState(100, 9, 8),),
    text_bytes=(400,),
    num_empty_documents=(1,),
    problems=("a.jsonl:3: bad.",),
)
MANIFEST = Manifest(
    sources=(),
    ignored_files=(),
    tokenizer=TokenizerIdentity(name="t.model", sha256="ab" * 32, vocab_size=347),
    options={"append_eod": True},
    dtype="uint16",
    num_documents=9,
    num_tokens=100,
    text_bytes=400,
    num_empty_documents=1,
    problems=("a.jsonl:3: bad.",),
    tool_version="0.1",
)
REMEDY = ("journal:", "--restart")


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert read_journal(path) is None
    for journal in (JOURNAL, dataclasses.replace(JOURNAL, phase="publish", manifests=(MANIFEST,))):
        write_journal(path, journal)
        assert read_journal(path) == journal
    assert [file.name for file in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "content must be JSON, got: "),
        (b"{", "content must be JSON, got: "),
        (b"[]", r"content must be a table, got \[\]"),
        (b"{}", "format_version must be given, got nothing"),
        (b'{"format_version": 2}', "job must be given, got nothing"),
        (b'{"format_version": 2, "phase": "sleep"}', "phase must be 'encode', 'shuffle' or 'publish', got 'sleep'"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "journal").write_bytes(content)
    remedy = "It is no journal of an unfinished run; pass --restart to throw that run away and begin again."
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}/journal: {problem}.*\. {remedy}"):
        read_journal(tmp_path / "journal")


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b'{"format_version": 1}')
    with pytest.raises(DataError, match=r"format_version must be 2, got 1, .*with that version, or pass --restart"):
        read_journal(tmp_path / "journal")


@pytest.mark.parametrize(
    "change, differences",
    [
        (
            {"inputs": (InputState("a.jsonl", 11, 333), InputState("b.jsonl", 20, 223))},
            [
                ("a.jsonl: input", "got 11 bytes where there were 10"),
                ("b.jsonl: input", "got one that was modified since"),
            ],
        ),
        (
            {"inputs": (InputState("a.jsonl", 10, 111), InputState("c.jsonl", 20, 222))},
            [
                ("b.jsonl: input", "got none"),
                ("c.jsonl: input", "got a new file"),
            ],
        ),
        (
            {"inputs": (JOB.inputs[1], JOB.inputs[0])},
            [("input:", "same order")],
        ),
        (
            {"flags": {"json_keys": ["text", "title"], "append_eod": False, "seed": 7}},
            [
                ("json-keys:", "got text title where it was text"),
                ("append-eod:", "got off where it was on"),
                ("seed:", "got 7 where it was nothing"),
            ],
        ),
        (
            {"tokenizer_sha256": "cd" * 32, "shard": JobShard(2, 4), "tool_version": "0.2"},
            [
                ("tokenizer-model:", f"got {'cd' * 32} where it was {'ab' * 32}"),
                ("tool version:", "got 0.2 where it was 0.1"),
                ("shard:", "got 2/4 where it was 1/4"),
            ],
        ),
    ],
)
def test_another_job_is_refused_with_every_difference(change: dict, differences: list[tuple[str, ...]]) -> None:
    with pytest.raises(DataError) as caught:
        refuse_other_job(Path("journal"), JOB, dataclasses.replace(JOB, **change))
    assert_problems(caught.value.problems, *differences, REMEDY)


def test_many_differences_are_cut_short() -> None:
    asked = dataclasses.replace(JOB, inputs=tuple(InputState(f"{n}.jsonl", 1, 1) for n in range(100)))
    with pytest.raises(DataError) as caught:
        refuse_other_job(Path("journal"), JOB, asked)
    assert len(caught.value.problems) == 22
    assert_problem(caught.value.problems[-2], "inputs and flags:", "82 more")


def test_the_same_job_continues() -> None:
    refuse_other_job(Path("journal"), JOB, dataclasses.replace(JOB))


def hold_lock(path: Path, connection: Connection) -> None:
    with lock_outputs(path):
        connection.send("held")
        connection.recv()


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "out" / "c.lock"
    ours, theirs = multiprocessing.Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=hold_lock, args=(path, theirs))
    owner.start()
    assert ours.recv() == "held"
    facts = ("another run is writing this output", f"got process {owner.pid} on ", "--output-prefix")
    with raises_problem(DataError, f"{path}:", *facts), lock_outputs(path):
        pass
    owner.kill()
    owner.join()
    assert path.exists()
    with lock_outputs(path):
        assert path.read_text().startswith(f"{os.getpid()} on ")
    assert not path.exists()


def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"file/c.lock: file cannot be written \(.+\). Free space, or choose another place."
    with pytest.raises(OutputError, match=message), lock_outputs(tmp_path / "file" / "c.lock"):
        pass
