"""Documents from files: .jsonl, .json, .txt, each plain or as .gz or .zst, and .parquet; files, globs, directories.

Reading happens in two steps so that the costly one can run elsewhere: `read_records` finds the bounds of each
document and is cheap; `decode_record` turns one record into text and can be called in another process.
A record that cannot be decoded is a DataError naming file:line, never a skipped line.
Lines and rows are streamed; a .txt file is one document, and a JSON array is parsed whole, so both must fit in memory.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import zstandard

from megatron_hammer.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
COMPRESSION_SUFFIXES = ("", ".gz", ".zst")
SUPPORTED_SUFFIXES = (*(t + c for t in TEXT_SUFFIXES for c in COMPRESSION_SUFFIXES), ".parquet")
READ_BUFFER_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 1024
UTF8_BOM = b"\xef\xbb\xbf"

OnBytesRead = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from: `line` counts from 1 (a row in parquet, an element in a JSON array)."""

    text: str
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Record:
    """One document before decoding; `payload` is JSON text, a row that is already parsed, or plain UTF-8 text."""

    source: str
    line: int
    payload: bytes | dict[str, Any]
    is_plain_text: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFiles:
    """The files that inputs stand for, in reading order, and those in directories that no reader handles."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]


def find_input_files(inputs: Sequence[str | Path]) -> InputFiles:
    """Resolve files, glob patterns and directories (searched recursively, in sorted order) to files.

    Raises DataError listing every input that is missing, matches nothing, has a type that cannot be read, or names a
    file that another input names too: its documents would be there twice.
    """
    files: dict[Path, str] = {}
    ignored: list[Path] = []
    problems: list[str] = []
    for item in map(str, inputs):
        try:
            found = _resolve_input(item)
        except DataError as error:
            problems.extend(error.problems)
            continue
        ignored.extend(found.ignored)
        for path in found.files:
            if path in files:
                problems.append(
                    f"{path}: file must be named once, got it from {files[path]} and {item}. Drop one of them."
                )
            files[path] = item
    if problems:
        raise DataError(*problems)
    return InputFiles(files=tuple(files), ignored=tuple(ignored))


def read_documents(inputs: Sequence[str | Path], json_key: str = "text") -> Iterator[Document]:
    """Yield every document of the inputs, in order; `json_key` is the field or column that holds the text.

    Raises DataError at the first record that is not a document, naming file:line.
    """
    for record in read_records(find_input_files(inputs).files, (json_key,)):
        (text,) = decode_record(record, (json_key,))
        yield Document(text, record.source, record.line)


def read_records(
    files: Iterable[Path], json_keys: Sequence[str], on_bytes_read: OnBytesRead = lambda num_bytes: None
) -> Iterator[Record]:
    """Yield the undecoded records of the files; `on_bytes_read` is told of each chunk's size on disk as it is read.

    json_keys: the fields that `decode_record` will ask for; of a Parquet file no other column is read.
    Raises DataError if a file cannot be read to its end: a broken or truncated archive, an unreadable file.
    """
    for path in files:
        line = 0
        try:
            for record in _read_file(path, json_keys, on_bytes_read):
                line = record.line
                yield record
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            cause = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(
                f"{path}:{line + 1}: file must be readable to its end, got: {cause}. "
                "Fetch or write it again; it may be truncated."
            ) from error


def decode_record(record: Record, json_keys: Sequence[str]) -> tuple[str, ...]:
    """Return the text of each key; raises DataError naming file:line if the record has no such texts."""
    if record.is_plain_text:
        if len(json_keys) > 1:
            raise _bad_record(record, f"plain text has one field, got {len(json_keys)} keys", "Pass one --json-keys")
        return (_decode_utf8(record, cast(bytes, record.payload)),)
    fields = record.payload if isinstance(record.payload, dict) else _parse_json_line(record, record.payload)
    return tuple(_select_text(record, fields, key) for key in json_keys)


def _resolve_input(text: str) -> InputFiles:
    path = Path(text)
    if path.is_dir():
        return _search_directory(path)
    if path.exists():
        if not _is_supported(path):
            raise DataError(
                f"{path}: file type must be one of {' '.join(SUPPORTED_SUFFIXES)}, got {path.suffix or 'none'}. "
                "Convert or rename it."
            )
        if not path.is_file():  # its size and hash belong in the manifest, and a pipe can be read only once
            raise DataError(f"{path}: input must be a regular file, got a pipe or a device. Write it to a file first.")
        return InputFiles(files=(path,), ignored=())
    if glob.has_magic(text):
        matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
        if not matches:
            raise DataError(f"{text}: pattern must match a file, got none. Check the folder and the suffix.")
        return find_input_files(matches)
    raise DataError(f"{text}: input file does not exist. Check the path.")


def _search_directory(directory: Path) -> InputFiles:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    files = tuple(path for path in found if _is_supported(path))
    if not files:
        raise DataError(
            f"{directory}: directory must hold a file of type {' '.join(SUPPORTED_SUFFIXES)}, "
            f"got none among {len(found)} files. Check the path."
        )
    return InputFiles(files=files, ignored=tuple(path for path in found if not _is_supported(path)))


def _is_supported(path: Path) -> bool:
    return path.name.lower().endswith(SUPPORTED_SUFFIXES)


def _read_file(path: Path, json_keys: Sequence[str], on_bytes_read: OnBytesRead) -> Iterator[Record]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _read_parquet(path, json_keys, on_bytes_read)
        return
    with _open_decompressed(path, on_bytes_read) as stream:
        bare_name = name.removesuffix(".gz").removesuffix(".zst")
        if bare_name.endswith(".txt"):
            yield Record(str(path), 1, stream.read().removeprefix(UTF8_BOM), is_plain_text=True)
        elif bare_name.endswith(".json") and _starts_with_bracket(stream):
            yield from _read_json_array(path, stream)
        else:
            for line, payload in enumerate(stream, start=1):
                yield Record(str(path), line, payload.removeprefix(UTF8_BOM) if line == 1 else payload)


def _open_decompressed(path: Path, on_bytes_read: OnBytesRead) -> "io.BufferedReader[Any]":
    raw: io.BufferedReader[Any] = io.BufferedReader(_CountingReader(path, on_bytes_read), READ_BUFFER_BYTES)
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), READ_BUFFER_BYTES)
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), READ_BUFFER_BYTES)
    return raw


class _CountingReader(io.RawIOBase):
    """A file that reports how many bytes were read from it."""

    def __init__(self, path: Path, on_bytes_read: OnBytesRead):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._on_bytes_read = on_bytes_read

    def readable(self) -> bool:
        return True

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
        self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            leftover = b""
            if self._frame is not None and self._frame.eof:
                leftover, self._frame = self._frame.unused_data, None
            chunk = leftover or self._compressed.read(READ_BUFFER_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._decompressed = self._frame.decompress(chunk)
        size = min(len(buffer), len(self._decompressed))
        buffer[:size] = self._decompressed[:size]
        self._decompressed = self._decompressed[size:]
        return size

    def close(self) -> None:
        self._compressed.close()
        super().close()


def _starts_with_bracket(stream: "io.BufferedReader[Any]") -> bool:
    return stream.peek(64).removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def _read_json_array(path: Path, stream: BinaryIO) -> Iterator[Record]:
    content = stream.read().removeprefix(UTF8_BOM)
    try:
        elements = json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{path}:1: file must be one JSON array or one JSON object a line, got invalid JSON ({error}). Repair it."
        ) from error
    for line, element in enumerate(elements, start=1):
        payload = element if isinstance(element, dict) else orjson.dumps(element)
        yield Record(str(path), line, payload)


def _read_parquet(path: Path, json_keys: Sequence[str], on_bytes_read: OnBytesRead) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
            has_all_keys = set(json_keys) <= set(file.schema_arrow.names)
            columns = list(json_keys) if has_all_keys else None  # None: all, for the message that names them
            line = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                on_bytes_read(round(bytes_per_row * batch.num_rows))
                for row in batch.to_pylist():
                    line += 1
                    yield Record(str(path), line, row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: file must be Parquet, got one that does not parse ({error}). Write it again.") from (
            error
        )


def _parse_json_line(record: Record, payload: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(payload)
    except orjson.JSONDecodeError:
        fields = _parse_json_line_slowly(record, payload)
    if not isinstance(fields, dict):
        raise _bad_record(record, f"line must be one JSON object, got {_name_of_type(fields)}")
    return fields


def _parse_json_line_slowly(record: Record, payload: bytes) -> Any:
    """Parse what orjson refuses: NaN, huge integers and escaped surrogates are valid here; otherwise say what is wrong.

    Python's own parser decides, because it is the one that Megatron-LM's tool uses.
    """
    if not payload.strip():
        raise _bad_record(record, "line must be one JSON object, got a blank line")
    text = _decode_utf8(record, payload.rstrip())
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cause = str(error)
        if isinstance(error, json.JSONDecodeError):
            cause = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        fact = f"line must be one JSON object, got invalid JSON ({cause})"
        raise _bad_record(record, fact, "Repair it, or write one JSON object a line") from error


def _decode_utf8(record: Record, payload: bytes) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {payload[error.start]:#04x} at offset {error.start}"
        raise _bad_record(record, f"text must be UTF-8, got {where}", "Convert the file with iconv") from error


def _select_text(record: Record, fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        keys = ", ".join(str(name) for name in fields)
        texts = [name for name, value in fields.items() if isinstance(value, str)]
        remedy = f"Pass --json-keys {max(texts, key=lambda name: len(fields[name]))}" if texts else ""
        raise _bad_record(record, f'field "{key}" is missing, got keys [{keys}]', remedy)
    text = fields[key]
    if not isinstance(text, str):
        raise _bad_record(record, f'field "{key}" must be a string, got {_name_of_type(text)}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise _bad_record(record, f'field "{key}" must be valid Unicode, got the lone surrogate {surrogate}') from error
    return text


def _name_of_type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _bad_record(record: Record, fact: str, remedy: str = "") -> DataError:
    return DataError(f"{record.source}:{record.line}: {fact}. {remedy or 'Repair or remove it'}.")
