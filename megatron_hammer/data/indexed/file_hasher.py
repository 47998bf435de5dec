"""SHA-256 of files, computed while they are read and written, so the manifest needs no extra pass at the end."""

import hashlib
import queue
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

from megatron_hammer.data.indexed.manifest import SourceFile
from megatron_hammer.errors import HammerError
from megatron_hammer.files.read import cannot_read

# hashlib releases the interpreter lock for large chunks, so this thread does not hold up the others.
HASH_CHUNK_BYTES = 1 << 20


class FileHasher:
    """Hashes files in a thread, in the order asked for, until the `with` block ends or, on a signal, the process."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[Path, int | None] | None] = queue.SimpleQueue()
        self._completed: set[Path] = set()
        self._sources: dict[Path, SourceFile] = {}
        self._error: HammerError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._requests.put(None)

    def follow(self, path: Path, num_bytes: int) -> None:
        """Hash the first `num_bytes` of a file that is still being read or appended to; they must not change again."""
        self._requests.put((path, num_bytes))

    def complete(self, paths: Sequence[Path]) -> None:
        """Hash these files to their ends unless that has been asked for before."""
        for path in paths:
            if path not in self._completed:
                self._completed.add(path)
                self._requests.put((path, None))

    def finish(self, paths: Sequence[Path]) -> tuple[SourceFile, ...]:
        """Return the hashes of these files, when they are all known; raises DataError if one cannot be read."""
        self.complete(paths)
        self._requests.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return tuple(self._sources[path] for path in paths)

    def _run(self) -> None:
        with ExitStack() as stack:
            hashed: dict[Path, _HashedFile] = {}
            # After an error the remaining requests are not served: `finish` raises it.
            while (request := self._requests.get()) is not None and self._error is None:
                path, num_bytes = request
                try:
                    if path not in hashed:
                        hashed[path] = _HashedFile(stack.enter_context(open(path, "rb")))
                    hashed[path].advance(num_bytes)
                    if num_bytes is None:
                        self._sources[path] = hashed.pop(path).close(path)
                except OSError as error:
                    self._error = cannot_read(path, error)


class _HashedFile:
    """A file and the hash of the part read so far."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def advance(self, num_bytes: int | None) -> None:
        """Continue until `num_bytes` of the file are hashed, or the whole file."""
        while num_bytes is None or self._num_bytes < num_bytes:
            left_bytes = HASH_CHUNK_BYTES if num_bytes is None else num_bytes - self._num_bytes
            chunk = self._file.read(min(HASH_CHUNK_BYTES, left_bytes))
            if not chunk:
                return
            self._digest.update(chunk)
            self._num_bytes += len(chunk)

    def close(self, path: Path) -> SourceFile:
        self._file.close()
        return SourceFile(path=str(path), size_bytes=self._num_bytes, sha256=self._digest.hexdigest())
