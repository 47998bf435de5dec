"""Raw text with each document once: the first of every set of equal, or nearly equal, documents is kept, in order.

Exact duplicates have the same text, or the same but for white space. Near duplicates are those of
`near_duplicates.py`. JSON that is kept is written as it was, with all its fields; of a Parquet row or a text file the
text alone is, under the same key.
The output depends on the inputs and the options only. Memory: 24 bytes a document, and what near duplicates add.
"""

import gzip
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import orjson
import zstandard

from megatron_hammer.data.atomic_files import open_atomically
from megatron_hammer.data.blocks import BlockKind
from megatron_hammer.data.near_duplicates import NearDuplicateIndex, NearDuplicateOptions
from megatron_hammer.data.readers import Record, decode_record, find_input_files, read_records
from megatron_hammer.errors import ConfigError

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
DIGEST_BYTES = 16
DIGEST_DTYPE = np.dtype(f"S{DIGEST_BYTES}")
BATCH_DOCUMENTS = 4096
BATCH_CHARACTERS = 8 << 20
LINE_BITS = 40
ZSTD_LEVEL = 3
GZIP_LEVEL = 6
LINE_ENDS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupOptions:
    """One run; near_duplicates: None for exact duplicates alone. report_path: a line for each removed document."""

    inputs: tuple[str, ...]
    output_path: Path
    json_key: str = "text"
    ignores_whitespace: bool = False
    near_duplicates: NearDuplicateOptions | None = None
    report_path: Path | None = None


@dataclass(kw_only=True, slots=True)
class DedupCounts:
    """What a run has seen so far, text in UTF-8 bytes; input_bytes counts files as they lie on disk."""

    num_documents: int = 0
    num_exact_duplicates: int = 0
    num_near_duplicates: int = 0
    text_bytes: int = 0
    kept_text_bytes: int = 0
    read_bytes: int = 0
    input_bytes: int = 0

    @property
    def num_kept(self) -> int:
        return self.num_documents - self.num_exact_duplicates - self.num_near_duplicates


@dataclass(frozen=True, slots=True)
class _Document:
    record: Record
    text: str
    location: int


def deduplicate(options: DedupOptions, on_progress: Callable[[DedupCounts], None] = lambda counts: None) -> DedupCounts:
    """Write the documents that remain, and the report, and return the counts.

    Raises ConfigError for options that cannot work, and DataError for inputs that cannot be read; then no output
    has been written.
    """
    near = None if options.near_duplicates is None else NearDuplicateIndex(options.near_duplicates)
    files = find_input_files(options.inputs).files
    _refuse_bad_outputs(options, files)
    counts = DedupCounts(input_bytes=sum(path.stat().st_size for path in files))
    with ExitStack() as stack:
        output = stack.enter_context(open_compressed(options.output_path))
        report = None if options.report_path is None else stack.enter_context(open_compressed(options.report_path))
        run = _Run(options, files, near, output, report, counts)
        for batch in _read_batches(files, options.json_key, counts):
            run.remove_duplicates(batch)
            on_progress(counts)
    return counts


def _refuse_bad_outputs(options: DedupOptions, files: Sequence[Path]) -> None:
    problems = []
    outputs = {"output": options.output_path, "report": options.report_path}
    inputs = {path.resolve() for path in files}
    for flag, path in outputs.items():
        if path is None:
            continue
        if not path.name.endswith(OUTPUT_SUFFIXES):
            problems.append(
                f"{flag}: file name must end with {', '.join(OUTPUT_SUFFIXES)}, got {path}. Pass --{flag} {path}.jsonl."
            )
        if path.resolve() in inputs:
            problems.append(f"{flag}: must not be one of the inputs, got {path}. Choose another name.")
    if options.report_path is not None and options.report_path.resolve() == options.output_path.resolve():
        problems.append(f"report: must differ from --output, got {options.report_path}. Choose another name.")
    if problems:
        raise ConfigError(*problems)


def _read_batches(files: Sequence[Path], json_key: str, counts: DedupCounts) -> Iterator[list[_Document]]:
    def count_read_bytes(num_bytes: int) -> None:
        counts.read_bytes += num_bytes

    file_numbers = {str(path): number for number, path in enumerate(files)}
    batch: list[_Document] = []
    num_characters = 0
    for record in read_records(files, (json_key,), count_read_bytes):
        (text,) = decode_record(record, (json_key,))
        batch.append(_Document(record, text, file_numbers[record.source] << LINE_BITS | record.line))
        num_characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


class _Run:
    """The open outputs of one run, and what it remembers of the documents so far."""

    def __init__(
        self,
        options: DedupOptions,
        files: Sequence[Path],
        near: NearDuplicateIndex | None,
        output: BinaryIO,
        report: BinaryIO | None,
        counts: DedupCounts,
    ):
        self._options = options
        self._files = files
        self._near = near
        self._output = output
        self._report = report
        self._counts = counts
        self._occurrences = FirstOccurrences()

    def remove_duplicates(self, batch: Sequence[_Document]) -> None:
        digests = [
            digest_text(document.text, ignores_whitespace=self._options.ignores_whitespace) for document in batch
        ]
        locations = np.array([document.location for document in batch], dtype=np.int64)
        firsts = self._occurrences.add(np.array(digests, dtype=DIGEST_DTYPE), locations)
        for document, first in zip(batch, firsts.tolist(), strict=True):
            text_bytes = len(document.text.encode("utf-8"))
            self._counts.num_documents += 1
            self._counts.text_bytes += text_bytes
            if first != document.location:
                self._counts.num_exact_duplicates += 1
                self._report_removed(document, first, "exact", 1.0)
            elif not self._is_near_duplicate(document):
                self._counts.kept_text_bytes += text_bytes
                self._output.write(encode_record(document.record, document.text, self._options.json_key))

    def _is_near_duplicate(self, document: _Document) -> bool:
        """Whether it resembles a document that was kept; if not, it is remembered as one."""
        signature = None if self._near is None else self._near.sign(document.text)
        if self._near is None or signature is None:
            return False
        match = self._near.find(signature)
        if match is None:
            self._near.add(document.location, signature)
            return False
        self._counts.num_near_duplicates += 1
        self._report_removed(document, match.key, "near", match.similarity)
        return True

    def _report_removed(self, document: _Document, first: int, kind: str, similarity: float) -> None:
        if self._report is None:
            return
        original = f"{self._files[first >> LINE_BITS]}:{first & ((1 << LINE_BITS) - 1)}"
        row = {
            "removed": f"{document.record.source}:{document.record.line}",
            "duplicate_of": original,
            "kind": kind,
            "similarity": similarity,
        }
        self._report.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


class FirstOccurrences:
    """Where each digest was first met; a few sorted runs that are merged as they grow, 24 bytes a digest."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, digests: np.ndarray, locations: np.ndarray) -> np.ndarray:
        """Return where each digest was first met, its own location if that is here: int64 [n].

        digests: [n] of DIGEST_DTYPE, in order of meeting; locations: int64 [n].
        """
        unique, first_indices, inverse = np.unique(digests, return_index=True, return_inverse=True)
        firsts = locations[first_indices]
        is_known = np.zeros(len(unique), dtype=bool)
        for run_digests, run_locations in self._runs:
            positions = np.minimum(np.searchsorted(run_digests, unique), len(run_digests) - 1)
            is_here = run_digests[positions] == unique
            firsts[is_here] = run_locations[positions[is_here]]
            is_known |= is_here
        if not is_known.all():
            self._append_run(unique[~is_known], firsts[~is_known])
        return firsts[inverse]

    def _append_run(self, digests: np.ndarray, locations: np.ndarray) -> None:
        """Runs shrink by half or more from first to last, so that there are few, and each digest moves few times."""
        while self._runs and len(self._runs[-1][0]) < 2 * len(digests):
            run_digests, run_locations = self._runs.pop()
            digests = np.concatenate((run_digests, digests))
            locations = np.concatenate((run_locations, locations))
            order = np.argsort(digests, kind="stable")
            digests, locations = digests[order], locations[order]
        self._runs.append((digests, locations))


def digest_text(text: str, *, ignores_whitespace: bool) -> bytes:
    """Return the 16 bytes that stand for a text; ignores_whitespace: a run counts as one space, at the ends as none."""
    compared = " ".join(text.split()) if ignores_whitespace else text
    return hashlib.blake2b(compared.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def encode_record(record: Record, text: str, json_key: str) -> bytes:
    """Return the document as a JSON line: the JSON that it came from where it came from any, with all its fields."""
    if record.kind in (BlockKind.LINES, BlockKind.ELEMENTS) and isinstance(record.payload, bytes):
        # A line end in JSON stands between values only: strings escape it.
        return record.payload.strip().translate(LINE_ENDS_TO_SPACES) + b"\n"
    return orjson.dumps({json_key: text}, option=orjson.OPT_APPEND_NEWLINE)


@contextmanager
def open_compressed(path: Path) -> Iterator[BinaryIO]:
    """Open a .jsonl, .jsonl.gz or .jsonl.zst that exists when it is complete; the same content is the same bytes."""
    with open_atomically(path) as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=GZIP_LEVEL, mtime=0) as compressed:
                yield cast(BinaryIO, compressed)
        elif path.name.endswith(".zst"):
            with zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(file, closefd=False) as compressed:
                yield compressed
        else:
            yield file
