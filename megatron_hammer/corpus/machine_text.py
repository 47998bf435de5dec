"""A small corpus from text that every machine with Python already has: nothing is downloaded.

It takes the standard library's sources and documentation, and the licences and descriptions of installed packages and
of the system. It is for demonstrations and tests: enough for a loss to fall, not for a model that anyone needs.
The same machine, seed and limits give the same bytes; another machine has other packages, hence another corpus.
"""

import hashlib
import importlib.metadata
import os
import random
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import orjson

from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import publish_file

# Not prose and not typical code: tables of code pages, generated topics (read as topics below), tests, vendored wheels.
SKIPPED_STDLIB_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "pydoc_data", "site-packages"}
    | {"test", "tests"}
)
PACKAGE_TEXT_NAMES = ("AUTHORS", "CHANGELOG", "CONTRIBUTING", "COPYING", "LICEN", "METADATA", "NOTICE", "README")
SYSTEM_TEXT_PATTERNS = ("common-licenses/*", "doc/*/README*", "doc/*/NEWS*")
SYSTEM_TEXT_ROOT = Path("/usr/share")
MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_BYTES = 200_000

TextLoader = Callable[[], str]


@dataclass(kw_only=True, slots=True)
class MachineCorpus:
    """What `build_machine_corpus` wrote, and why the rest was left out."""

    num_train_documents: int = 0
    num_valid_documents: int = 0
    train_bytes: int = 0
    valid_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def build_machine_corpus(
    output_path: Path,
    *,
    max_bytes: int = 12_000_000,
    seed: int = 1234,
    valid_output_path: Path | None = None,
    valid_ratio: float = 0.02,
    candidates: Mapping[str, TextLoader] | None = None,
) -> MachineCorpus:
    """Write {"text", "source"} lines until the texts reach `max_bytes` (UTF-8), in an order set by the seed.

    With `valid_output_path`, a document whose hash falls under `valid_ratio` goes there: the same text always lands on
    the same side, but for a corpus so small that the one with the least hash must do. Raises DataError if the machine
    has no such text, or if either file would be empty.
    """
    candidates = find_machine_text() if candidates is None else candidates
    # Sorted first: folders are listed in the order of the file system, and the seed alone must set the order.
    names = sorted(candidates)
    random.Random(seed).shuffle(names)
    corpus = MachineCorpus()
    paths = [output_path, valid_output_path] if valid_output_path else [output_path]
    with ExitStack() as stack:
        files = [stack.enter_context(publish_file(path)) for path in paths]
        selected = list(_select_texts(names, candidates, max_bytes, corpus.skipped))  # it is a small corpus
        limit = valid_ratio
        # In a small corpus every hash may lie above the ratio. Then the document with the smallest hash is held out.
        if valid_ratio > 0 and len(selected) > 1:
            limit = max(limit, min(_hash_fraction(digest) for _, _, digest in selected))
        for name, text, digest in selected:
            is_valid = valid_output_path is not None and _hash_fraction(digest) <= limit
            _write_document(files[is_valid], name, text, corpus, is_valid)
        _refuse_empty(corpus, output_path, valid_output_path)
    return corpus


def find_machine_text() -> dict[str, TextLoader]:
    """Return a loader for each text by its relative name, such as stdlib/ast.py; nothing is read yet."""
    candidates: dict[str, TextLoader] = {}
    candidates.update(_find_stdlib_sources(Path(sysconfig.get_path("stdlib"))))
    candidates.update(_find_python_topics())
    candidates.update(_find_package_texts())
    candidates.update(_find_system_texts(SYSTEM_TEXT_ROOT))
    return candidates


def _find_stdlib_sources(root: Path) -> Iterator[tuple[str, TextLoader]]:
    for folder, subfolders, names in os.walk(root):
        # In place: os.walk descends only into what is left in this list.
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_STDLIB_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                yield f"stdlib/{path.relative_to(root).as_posix()}", partial(_read_source, path)


def _find_python_topics() -> Iterator[tuple[str, TextLoader]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in topics.items():
        yield f"pydoc/{name}", partial(str, text)


def _find_package_texts() -> Iterator[tuple[str, TextLoader]]:
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.name.upper().startswith(PACKAGE_TEXT_NAMES) and not file.name.endswith((".py", ".pyc", ".so")):
                path = Path(str(file.locate()))
                # METADATA may begin with an editable install's path, and its headers are not prose
                is_metadata = file.name == "METADATA"
                name = f"packages/{distribution.name}/{'/'.join(part for part in file.parts if part != '..')}"
                yield name, partial(_read_text, path, is_metadata)


def _find_system_texts(root: Path) -> Iterator[tuple[str, TextLoader]]:
    for pattern in SYSTEM_TEXT_PATTERNS:
        for path in root.glob(pattern):
            if path.is_file() and path.suffix not in {".gz", ".xz"}:
                yield f"system/{path.relative_to(root).as_posix()}", partial(_read_text, path)


def _read_source(path: Path) -> str:
    with tokenize.open(path) as file:  # honours the coding line
        return file.read()


def _read_text(path: Path, is_metadata: bool = False) -> str:
    text = path.read_text(encoding="utf-8")
    return text.partition("\n\n")[2] if is_metadata else text  # the headers end at the first empty line


def _select_texts(
    names: list[str], candidates: Mapping[str, TextLoader], max_bytes: int, skipped: Counter[str]
) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, text and sha256 of what is kept, up to `max_bytes`; count in `skipped` what is not, by cause."""
    seen: set[bytes] = set()
    num_bytes = 0
    for name in names:
        try:
            text = candidates[name]()
        except (OSError, UnicodeError, SyntaxError):
            skipped["unreadable"] += 1
            continue
        encoded = text.encode("utf-8", errors="replace")
        digest = hashlib.sha256(encoded).digest()
        # After a text that is too large for the rest of the limit, a smaller one may still fit.
        if cause := _cause_to_skip(text, len(encoded), digest in seen, num_bytes + len(encoded) > max_bytes):
            skipped[cause] += 1
            continue
        seen.add(digest)
        num_bytes += len(encoded)
        yield name, encoded.decode("utf-8"), digest


def _cause_to_skip(text: str, num_bytes: int, is_duplicate: bool, is_over_limit: bool) -> str | None:
    if len(text.strip()) < MIN_DOCUMENT_CHARS:
        return "too short"
    if num_bytes > MAX_DOCUMENT_BYTES:
        return "too long"
    if is_duplicate:
        return "duplicate"
    return "beyond max-bytes" if is_over_limit else None


def _hash_fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def _write_document(file: BinaryIO, name: str, text: str, corpus: MachineCorpus, is_valid: bool) -> None:
    file.write(orjson.dumps({"text": text, "source": name}, option=orjson.OPT_APPEND_NEWLINE))
    num_bytes = len(text.encode("utf-8"))
    if is_valid:
        corpus.num_valid_documents += 1
        corpus.valid_bytes += num_bytes
    else:
        corpus.num_train_documents += 1
        corpus.train_bytes += num_bytes


def _refuse_empty(corpus: MachineCorpus, output_path: Path, valid_output_path: Path | None) -> None:
    if corpus.num_train_documents == 0:
        raise DataError(
            f"{output_path}: corpus must have a document, got none ({dict(corpus.skipped)}). "
            "Raise --max-bytes, or install Python with its standard library's sources."
        )
    if valid_output_path is not None and corpus.num_valid_documents == 0:
        raise DataError(
            f"{valid_output_path}: held-out corpus must have a document, got none of {corpus.num_train_documents}. "
            "Raise --valid-ratio or --max-bytes."
        )
