"""A manifest comes back as it was written, and one that cannot be trusted is named."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from megatron_hammer.data.indexed.manifest import (
    JobShard,
    Manifest,
    SourceFile,
    TokenizerIdentity,
    describe_source,
    encode_manifest,
    hash_file,
    manifest_path,
    read_manifest,
    read_tool_version,
)
from megatron_hammer.errors import DataError

MANIFEST = Manifest(
    sources=(SourceFile(path="corpus/a.jsonl", size_bytes=123, sha256="ab" * 32),),
    ignored_files=("corpus/notes.md",),
    tokenizer=TokenizerIdentity(name="t.model", sha256="cd" * 32, vocab_size=347),
    options={"json_key": "text", "append_eod": True},
    shard=JobShard(3, 16),
    dtype="uint16",
    num_documents=7,
    num_sequences=9,
    num_tokens=40,
    text_bytes=100,
    num_empty_documents=1,
    problems=("corpus/a.jsonl:3: bad. Repair or remove it.",),
    bin_sha256="ef" * 32,
    idx_sha256="01" * 32,
    tool_version="0.1.0",
)


def write(prefix: Path, manifest: Manifest = MANIFEST) -> Path:
    manifest_path(prefix).write_bytes(encode_manifest(manifest))
    return manifest_path(prefix)


def test_round_trip(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus.v1_text_document"
    path = write(prefix)
    assert path.name == "corpus.v1_text_document.manifest.json"
    assert read_manifest(prefix) == MANIFEST
    fields = json.loads(path.read_bytes())
    assert fields["bytes_per_token"] == MANIFEST.bytes_per_token == 2.5
    assert fields["num_dropped_documents"] == MANIFEST.num_dropped_documents == 1


def test_a_pair_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "pair") is None


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "content must be JSON, got: "),
        ("[]", r"content must be a table, got \[\]"),
        ("{}", "format_version must be given, got nothing"),
        ('{"format_version": 1, "sources": 3}', "sources must be a list, got 3"),
        ('{"format_version": "x"}', "format_version must be a whole number, got 'x'"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_named(tmp_path: Path, content: str, message: str) -> None:
    manifest_path(tmp_path / "pair").write_text(content)
    with pytest.raises(DataError, match=rf"pair.manifest.json: {message}.*It is no manifest of preprocess_data.py"):
        read_manifest(tmp_path / "pair")


def test_a_later_format_is_refused_and_an_unknown_field_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "pair")
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps(fields | {"added_later": 1}))
    assert read_manifest(tmp_path / "pair") == MANIFEST
    path.write_text(json.dumps(fields | {"format_version": 2}))
    with pytest.raises(DataError, match=r"format_version must be at most 1, got 2. Update megatron_hammer."):
        read_manifest(tmp_path / "pair")


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "pair")
    added = {"shard", "num_sequences", "bin_sha256", "idx_sha256"}
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in added}))
    expected = dataclasses.replace(MANIFEST, shard=None, num_sequences=None, bin_sha256=None, idx_sha256=None)
    assert read_manifest(tmp_path / "pair") == expected


def test_source_has_size_and_hash(tmp_path: Path) -> None:
    content = b"0123456789" * 300_000
    (tmp_path / "a").write_bytes(content)
    source = describe_source(tmp_path / "a")
    assert (source.size_bytes, source.sha256) == (3_000_000, hashlib.sha256(content).hexdigest())
    assert hash_file(tmp_path / "a") == source.sha256


def test_tool_version_is_never_empty() -> None:
    assert read_tool_version()
