"""Whether all hosts see one folder, how fast it is, and whether a file in it is replaced in one step.

Checkpoints are written by all hosts into one folder, under names that a rename makes final. Where a host has another
folder of that path, or sees half of a file, a checkpoint is lost when it is needed.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NUM_VERSIONS = 20
VERSION_BYTES = 1 << 16
VERSION_INTERVAL_S = 0.02
BLOCK_BYTES = 1 << 24
POLL_S = 0.01


def write_version(path: Path, number: int, rename: Callable[[Path, Path], object] = os.replace) -> None:
    """Replace the file by one that holds `number` throughout, as publish_file does."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(_content(number))
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def write_versions(path: Path, rename: Callable[[Path, Path], object] = os.replace) -> None:
    """Replace the file many times, while others read it (watch_versions)."""
    for number in range(1, NUM_VERSIONS + 1):
        write_version(path, number, rename)
        time.sleep(VERSION_INTERVAL_S)


def watch_versions(path: Path, timeout_s: float) -> tuple[list[str], float | None]:
    """(what was wrong, time of day at which the last version was seen) of a file that write_versions replaces.

    Every reading must find one whole version, and none older than the one before. The time is None if the last version
    did not appear in timeout_s.
    """
    deadline_s, newest, problems = time.monotonic() + timeout_s, 0, dict[str, None]()
    while time.monotonic() < deadline_s:
        try:
            number = _read_version(path.read_bytes())
        except OSError as error:
            # ESTALE of NFS, too: a file that was replaced is gone for a reader that has just opened it.
            problems[f"the file could not be read while it was replaced ({error.strerror})"] = None
        else:
            if number is None:
                problems["a part of the file was read while it was replaced"] = None
            elif number < newest:
                problems["an older version of the file was read after a newer one"] = None
            else:
                newest = number
        if newest == NUM_VERSIONS:
            return list(problems), time.time()
        time.sleep(POLL_S / 10)
    return list(problems), None


def wait_for_text(path: Path, text: str, timeout_s: float) -> float | None:
    """Seconds until the file holds the text; None if it does not in timeout_s."""
    started_at_s = time.monotonic()
    while time.monotonic() - started_at_s < timeout_s:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return time.monotonic() - started_at_s
        time.sleep(POLL_S)
    return None


def time_file(path: Path, num_bytes: int, seed: int) -> tuple[float, float, bool]:
    """(bytes per second written and synced, read again, whether the same was read) for one file, which is removed.

    The system is asked to forget the file before it is read; where it does not, memory is read and not the disk.
    """
    block = np.random.default_rng(seed).bytes(BLOCK_BYTES)
    num_blocks = max(1, num_bytes // BLOCK_BYTES)
    try:
        started_at_s = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(num_blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written_s = time.perf_counter() - started_at_s
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started_at_s = time.perf_counter()
            is_same = all(file.read(BLOCK_BYTES) == block for _ in range(num_blocks)) and not file.read(1)
            read_s = time.perf_counter() - started_at_s
    finally:
        path.unlink(missing_ok=True)
    size = num_blocks * BLOCK_BYTES
    return size / written_s, size / read_s, is_same


def _content(number: int) -> bytes:
    return np.full(VERSION_BYTES // 4, number, dtype="<u4").tobytes()


def _read_version(content: bytes) -> int | None:
    """The number of a whole version; None of a part or a mixture."""
    if len(content) != VERSION_BYTES:
        return None
    numbers = np.frombuffer(content, dtype="<u4")
    return int(numbers[0]) if (numbers == numbers[0]).all() else None
