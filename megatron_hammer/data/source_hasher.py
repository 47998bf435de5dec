"""SHA-256 of input files beside the reading of them, so that the manifest costs no time of its own."""

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from megatron_hammer.data.manifest import SourceFile, describe_source
from megatron_hammer.errors import DataError


class SourceHasher:
    """Hashes files in a thread, in the order of `add`, until the `with` block ends or, on a signal, the process."""

    def __init__(self) -> None:
        self._paths: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._added: set[Path] = set()
        self._sources: dict[Path, SourceFile] = {}
        self._error: DataError | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._paths.put(None)

    def add(self, paths: Sequence[Path]) -> None:
        """Hash these files unless they have been added before."""
        for path in paths:
            if path not in self._added:
                self._added.add(path)
                self._paths.put(path)

    def finish(self, paths: Sequence[Path]) -> tuple[SourceFile, ...]:
        """Return the hashes of these files, when they are all known; raises DataError if one cannot be read."""
        self.add(paths)
        self._paths.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return tuple(self._sources[path] for path in paths)

    def _hash(self) -> None:
        while (path := self._paths.get()) is not None and self._error is None:
            try:
                self._sources[path] = describe_source(path)
            except DataError as error:
                self._error = error
