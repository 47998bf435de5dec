"""The SHA-256 of every file of an iteration, in a file of the iteration's folder; no torch, no Megatron.

The file has the name and the format of Megatron's own `--verify-integrity`, with the sizes added, so each verifies what
the other wrote. It is written last: a folder that has it is complete. It detects damage, mixed copies and lost files.
It is no signature: who can write the folder can also write new hashes (see SECURITY.md).
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.errors import CheckpointError
from megatron_hammer.files.read import is_present, refuse_pipe

# Source: megatron.core.dist_checkpointing.validation.save_integrity_manifest of 0.19.2
HASHES_FILE = "integrity.json"
ALGORITHM = "sha256"
SHARD_SUFFIX = ".distcp"
_SHOWN_DIGITS = 12  # of a hash in a message
# What Megatron and torch open by name; a stray one would be loaded although no hash covers it.
_LOADED_NAME = re.compile(r"(?:.*\.metadata|metadata\.json|.*\.pt|.*\.distcp|mp_rank_.*)")
_WHAT_NOW = "The file is damaged or of another save; copy it again or use another iteration."


@dataclass(frozen=True, slots=True)
class FileHash:
    """What a file must hold. num_bytes: None in a file that Megatron wrote, which has no sizes."""

    sha256: str
    num_bytes: int | None


class HashingFile(io.BufferedWriter):
    """A new file for writing from front to back, which hashes what it is given: nothing is read again."""

    def __init__(self, path: str | Path):
        super().__init__(io.FileIO(path, "wb"))
        self._hash, self._num_bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._num_bytes += memoryview(data).nbytes
        return super().write(data)

    def fileno(self) -> int:
        # Who asks is about to sync the file, and the buffer is a part of it.
        self.flush()
        return super().fileno()

    @property
    def content(self) -> FileHash:
        """Of everything that was written so far, also after closing."""
        return FileHash(self._hash.hexdigest(), self._num_bytes)


def hash_file(path: Path) -> FileHash:
    """Reads the whole file; raises OSError."""
    with path.open("rb") as file:
        return FileHash(hashlib.file_digest(file, ALGORITHM).hexdigest(), os.fstat(file.fileno()).st_size)


def write_hashes(directory: Path, known: Mapping[str, FileHash] | None = None) -> int:
    """Write the hashes of all files that lie directly in `directory`, which nobody reads yet; returns their bytes.

    known: hashes by file name that were computed while the file was written. The other files are read.
    """
    known = known or {}
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and entry.name != HASHES_FILE)
    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(_count_threads()) as pool:
        read = dict(zip(unknown, pool.map(lambda name: hash_file(directory / name), unknown), strict=True))
    hashes = {name: known.get(name) or read[name] for name in names}
    content = {
        "algorithm": ALGORITHM,
        "files": {name: content.sha256 for name, content in hashes.items()},
        "sizes": {name: content.num_bytes for name, content in hashes.items()},
    }
    # Not through files/publish.py: the folder has no final name yet, and who writes it may hold its lock.
    with (directory / HASHES_FILE).open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return sum(content.num_bytes or 0 for content in hashes.values())


def read_hashes(directory: Path) -> dict[str, FileHash] | None:
    """The hashes by file name; None if the iteration was saved without. Raises CheckpointError for a damaged file."""
    path = directory / HASHES_FILE
    try:
        refuse_pipe(path, CheckpointError)
        content = json.loads(path.read_bytes())
        if content["algorithm"] != ALGORITHM:
            raise ValueError(f"algorithm {content['algorithm']}")
        sizes = content.get("sizes", {})
        # Exactly these: a damaged key must not leave a part of the comparison out.
        if not {"algorithm", "files"} <= set(content) <= {"algorithm", "files", "sizes"}:
            raise ValueError(f"the fields {', '.join(map(str, content))}")
        if "sizes" in content and set(sizes) != set(content["files"]):
            raise ValueError("other files in sizes than in files")
        hashes = {name: FileHash(digest, sizes.get(name)) for name, digest in content["files"].items()}
        for name, expected in hashes.items():
            _validate_entry(name, expected)
    except FileNotFoundError:
        is_present(path, raises=CheckpointError)  # raises for a link to nothing
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: must hold the {ALGORITHM} of each file of the checkpoint, got {type(error).__name__}: "
            f"{str(error)[:200]}. {_WHAT_NOW}"
        ) from error
    return hashes


def _validate_entry(name: str, expected: FileHash) -> None:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"a file outside the folder, {name!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", expected.sha256):
        raise ValueError(f"{expected.sha256!r} as the hash of {name}")
    if not (expected.num_bytes is None or type(expected.num_bytes) is int):
        raise ValueError(f"{expected.num_bytes!r} as the size of {name}")


def find_wrong_files(directory: Path, hashes: Mapping[str, FileHash]) -> list[str]:
    """A sentence for every file that is missing, of another size, or not of the save; reads no file."""
    problems = []
    for name, expected in sorted(hashes.items()):
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or (expected.num_bytes is not None and found != expected.num_bytes):
            wanted = "exist" if expected.num_bytes is None else f"hold the {expected.num_bytes} bytes that were saved"
            problems.append(f"{path}: must {wanted}, got {'no such file' if found is None else found}. {_WHAT_NOW}")
    strays = sorted(entry.name for entry in directory.iterdir() if entry.name not in hashes)
    for name in filter(_LOADED_NAME.fullmatch, strays):
        problems.append(
            f"{directory / name}: must be in {HASHES_FILE}, got no hash of it. Remove it: this save has none."
        )
    return problems


def find_damage(directory: Path, hashes: Mapping[str, FileHash], *, num_threads: int = 1) -> list[str]:
    """A sentence for every file whose contents are not those that were saved; reads all files that `hashes` names."""
    with ThreadPoolExecutor(num_threads) as pool:
        sentences = pool.map(lambda item: _describe_damage(directory / item[0], item[1]), sorted(hashes.items()))
        return [sentence for sentence in sentences if sentence is not None]


def _describe_damage(path: Path, expected: FileHash) -> str | None:
    try:
        found = hash_file(path).sha256
    except OSError as error:
        return f"{path}: file must be readable, got {error.strerror}. {_WHAT_NOW}"
    if found == expected.sha256:
        return None
    return (
        f"{path}: must have the contents that were saved ({ALGORITHM} {expected.sha256[:_SHOWN_DIGITS]}), "
        f"got {found[:_SHOWN_DIGITS]}. {_WHAT_NOW}"
    )


def select_small_files(hashes: Mapping[str, FileHash]) -> dict[str, FileHash]:
    """All but the shards: what describes the checkpoint, and is read before any tensor."""
    return {name: expected for name, expected in hashes.items() if not name.endswith(SHARD_SUFFIX)}


def select_share(hashes: Mapping[str, FileHash], *, index: int, num_shares: int) -> dict[str, FileHash]:
    """The files that reader `index` of `num_shares` checks, of about equal size; together all files, each once."""
    by_size = sorted(hashes.items(), key=lambda item: (-(item[1].num_bytes or 0), item[0]))
    loads = [0] * num_shares
    chosen = {}
    for name, expected in by_size:
        lightest = min(range(num_shares), key=lambda share: (loads[share], share))
        loads[lightest] += max(1, expected.num_bytes or 0)
        if lightest == index:
            chosen[name] = expected
    return chosen


def require_intact(directory: Path, names: Iterable[str] | None = None) -> bool:
    """Raise CheckpointError unless the files (all of them) are as saved; returns False where no hashes were saved."""
    hashes = read_hashes(directory)
    if hashes is None:
        return False
    wanted = dict(hashes if names is None else _select(hashes, names))
    problems = find_wrong_files(directory, hashes) or find_damage(directory, wanted, num_threads=_count_threads())
    if problems:
        raise CheckpointError(*problems)
    return True


def _select(hashes: Mapping[str, FileHash], names: Iterable[str]) -> Iterator[tuple[str, FileHash]]:
    for name in names:
        if name in hashes:
            yield name, hashes[name]


def _count_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
