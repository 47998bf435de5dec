"""The decompressed bytes of plain, .gz and .zst files, and a report of the bytes read from the disk."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_hammer.corpus.input_files import is_compressed

READ_BUFFER_BYTES = 1 << 20
# A few bytes of zstd can decompress to 128 KiB, so large chunks could need any amount of memory.
ZSTD_CHUNK_BYTES = 16 * 1024
# The limit of zstd on 64-bit machines, which `zstd --long=31` uses; the library's default is 2^27. Memory is taken for
# the window that a frame names, as far as it is used.
LARGEST_WINDOW_BYTES = 1 << 31
UTF8_BOM = b"\xef\xbb\xbf"

OnBytesRead = Callable[[int], None]


def open_decompressed(path: Path, on_bytes_read: OnBytesRead) -> "io.BufferedReader[Any]":
    """Open for buffered reading; a truncated archive raises EOFError, zlib.error or ZstdError where it ends.

    Raises EOFError for an archive without a byte: gzip and zstd write some for an empty file too, and refuse to read
    none, which is what a failed copy leaves.
    """
    # Counted below the decompression, because progress is compared with the sizes of the files on the disk.
    raw: io.BufferedReader[Any] = io.BufferedReader(_CountingReader(path, on_bytes_read), READ_BUFFER_BYTES)
    if not is_compressed(path):
        return raw
    if not raw.peek(1):
        raise EOFError("the file is empty, and an archive of nothing is not")
    # GzipFile reads every member of a file; _ZstdReader does the same for frames.
    stream = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else _ZstdReader(raw)
    return io.BufferedReader(cast(io.RawIOBase, stream), READ_BUFFER_BYTES)


def skip_to(stream: "io.BufferedReader[Any]", path: Path, offset: int) -> None:
    """Move from the start of the stream to `offset`, in decompressed bytes; only a plain file can jump there."""
    if not is_compressed(path):
        stream.seek(offset)
        return
    # An archive has no index, so everything before the offset must be decompressed.
    while offset > 0:
        skipped = len(stream.read(min(offset, READ_BUFFER_BYTES)))
        if not skipped:
            raise EOFError(f"the file ends {offset} bytes before the position to go on from")
        offset -= skipped


def starts_with_bracket(stream: "io.BufferedReader[Any]") -> bool:
    """Say whether the first character is `[`, as in a JSON array, without moving on."""
    return stream.peek(64).removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def explain_read_error(error: Exception) -> str:
    """Return the sentence that says what to do about an error in a file that was opened here."""
    text = str(error)
    if "too much memory" in text or "not enough memory" in text:
        largest = f"{LARGEST_WINDOW_BYTES >> 30} GiB"
        return f"Its window is larger than {largest} or the free memory: write it again with zstd --long=27 or less."
    if "Not a gzipped file" in text or "Unknown frame descriptor" in text:
        return "Name it after what it holds, or remove what follows the archive in it."
    return "Fetch or write it again; it may be truncated."


class _CountingReader(io.RawIOBase):
    """A file that reports how many bytes were read from it."""

    def __init__(self, path: Path, on_bytes_read: OnBytesRead):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._on_bytes_read = on_bytes_read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._file.readinto(buffer) or 0
        self._on_bytes_read(num_bytes)
        return num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdReader(io.RawIOBase):
    """Every frame of a .zst file; unlike zstandard's own reader, a file that ends inside a frame is an error."""

    def __init__(self, compressed: BinaryIO):
        self._compressed = compressed
        self._frame: Any = None
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what one chunk gave; 0 means the end. Raises EOFError if the file ends inside a frame."""
        while not self._decompressed:
            leftover = b""
            if self._frame is not None and self._frame.eof:
                # The rest of the chunk is the beginning of the next frame.
                leftover, self._frame = self._frame.unused_data, None
            chunk = leftover or self._compressed.read(ZSTD_CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
                self._frame = decompressor.decompressobj()  # one object reads one frame
            self._decompressed = memoryview(self._frame.decompress(chunk))
        size = min(len(buffer), len(self._decompressed))
        buffer[:size] = self._decompressed[:size]
        self._decompressed = self._decompressed[size:]
        return size

    def close(self) -> None:
        self._compressed.close()
        super().close()
