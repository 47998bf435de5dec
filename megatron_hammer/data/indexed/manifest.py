"""`<prefix>.manifest.json`: what a .bin/.idx pair was made from, so that training can refuse a wrong tokenizer or file.

It holds no time and no machine's name: the same inputs, tokenizer and options give the same manifest, and the merged
shards of a job give the manifest of the job done at once.
"""

import dataclasses
import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_hammer.corpus.input_files import MANIFEST_SUFFIX
from megatron_hammer.errors import DataError
from megatron_hammer.files.read import cannot_read, is_present
from megatron_hammer.files.typed import FormatVersion, read_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """An input file as the user named it."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerIdentity:
    """The tokenizer by name and content; its folder does not matter."""

    name: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class JobShard:
    """Part `index`, from 0, of a job that `count` runs share."""

    index: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The record of one preprocessing run; see the field names for units.

    sources: the input files in reading order; of a shard those that it read from, each with its whole size and hash, so
    a file that is cut between two shards is listed by both. ignored_files: files found in input directories that no
    reader handles. options: every flag that shapes the bytes, but not the shard. problems: one sentence for each
    dropped record. num_empty_documents: documents without tokens, which are kept.
    Fields that are None are missing from manifests of earlier versions; `shard` is None for a job that is not shared.
    """

    sources: tuple[SourceFile, ...]
    ignored_files: tuple[str, ...]
    tokenizer: TokenizerIdentity
    options: dict[str, Any]
    shard: JobShard | None = None
    dtype: str
    num_documents: int
    num_sequences: int | None = None
    num_tokens: int
    text_bytes: int
    num_empty_documents: int
    problems: tuple[str, ...]
    bin_sha256: str | None = None
    idx_sha256: str | None = None
    tool_version: str
    format_version: int = FORMAT_VERSION

    @property
    def num_dropped_documents(self) -> int:
        return len(self.problems)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens included; 0 without tokens."""
        return self.text_bytes / self.num_tokens if self.num_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived figures, ready for a JSON encoder."""
        derived = {"num_dropped_documents": self.num_dropped_documents, "bytes_per_token": self.bytes_per_token}
        return dataclasses.asdict(self) | derived


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}{MANIFEST_SUFFIX}")


def encode_manifest(manifest: Manifest) -> bytes:
    return orjson.dumps(manifest.to_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the manifest beside a pair; None if there is none, as for a pair that another tool wrote.

    Raises DataError if it is not a manifest, or one of a later format.
    """
    path = manifest_path(prefix)
    if not is_present(path):
        return None
    remedy = "It is no manifest of preprocess_data.py; preprocess the corpus again, or remove the manifest."
    # The version first: a later format may have other fields, and should be named as such.
    version = read_json(path, FormatVersion, remedy=remedy).format_version
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version must be at most {FORMAT_VERSION}, got {version}. Update megatron_hammer."
        )
    return read_json(path, Manifest, remedy=remedy)  # without the derived figures, and fields that are added later


def show_option(value: Any) -> str:
    """Return the value of an option as messages show it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "nothing"}[value]
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def describe_source(path: Path) -> SourceFile:
    """Read the file once and return its size and hash; raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return SourceFile(path=str(path), size_bytes=file.tell(), sha256=digest.hexdigest())
    except OSError as error:
        raise cannot_read(path, error) from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return describe_source(path).sha256


def read_tool_version() -> str:
    """Return the installed version of this package, or say that it runs from a bare checkout."""
    try:
        return importlib.metadata.version("megatron_hammer")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
