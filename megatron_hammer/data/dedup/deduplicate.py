"""Raw text with each document once: the first of every set of equal, or nearly equal, documents is kept, in order.

Exact duplicates have the same text, or differ only in white space. Near duplicates are those of
`near_duplicates.py`. A kept JSON record is written unchanged, with all its fields. Of a Parquet row or a text file only
the text is written, under the same key. The output depends on the inputs and the options only, never on the number of
workers. Memory: 24 bytes per document (65 while runs are merged), and with near duplicates 0.7 KB per kept document
(signature_index.py).
"""

import gzip
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import orjson
import zstandard

from megatron_hammer.corpus.blocks import Position, read_blocks, select_whole_files
from megatron_hammer.corpus.file_search import identify_file
from megatron_hammer.corpus.input_files import find_input_files, match_partials, show_path
from megatron_hammer.data.dedup.block_signer import BlockSignerRecipe, SignedBlock
from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions
from megatron_hammer.data.dedup.signature_index import Match, SignatureIndex
from megatron_hammer.data.dedup.sorted_runs import SortedRuns
from megatron_hammer.data.preprocess.worker_pool import encode_in_order
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_file

OUTPUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# A location is one int64: 2^40 lines per file leave 2^23 files.
LINE_BITS = 40
# The default levels of the command-line tools zstd and gzip.
ZSTD_LEVEL = 3
GZIP_LEVEL = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupOptions:
    """One run; near_duplicates: None for exact duplicates alone, for which one worker is enough.

    report_path: gets a line for each removed document.
    """

    inputs: tuple[str, ...]
    output_path: Path
    json_key: str = "text"
    ignores_whitespace: bool = False
    near_duplicates: NearDuplicateOptions | None = None
    num_workers: int = 1
    report_path: Path | None = None


@dataclass(kw_only=True, slots=True)
class DedupCounts:
    """What a run has seen so far, text in UTF-8 bytes; input_bytes counts files as they lie on disk.

    ignored_files: found in input directories, and of a type that no reader handles.
    """

    num_documents: int = 0
    num_exact_duplicates: int = 0
    num_near_duplicates: int = 0
    text_bytes: int = 0
    kept_text_bytes: int = 0
    read_bytes: int = 0
    input_bytes: int = 0
    ignored_files: tuple[str, ...] = ()

    @property
    def num_kept(self) -> int:
        return self.num_documents - self.num_exact_duplicates - self.num_near_duplicates


def deduplicate(options: DedupOptions, on_progress: Callable[[DedupCounts], None] = lambda counts: None) -> DedupCounts:
    """Write the documents that remain, and the report, and return the counts.

    Raises ConfigError for options that cannot work, DataError for inputs that cannot be read and PlatformError if a
    worker dies; then no output has been written.
    """
    if options.near_duplicates is not None:
        options.near_duplicates.validate()
    # An older output is no partial file: it may be the only copy of what it holds, so it is refused as an input below.
    found = find_input_files(options.inputs, match_partials(options.output_path, options.report_path))
    files = found.files
    _refuse_bad_outputs(options, files)
    counts = DedupCounts(
        input_bytes=sum(path.stat().st_size for path in files), ignored_files=tuple(map(show_path, found.ignored))
    )
    with ExitStack() as stack:
        output = stack.enter_context(open_compressed(options.output_path))
        report = None if options.report_path is None else stack.enter_context(open_compressed(options.report_path))
        run = _Run(options, files, output, report, counts)
        with closing(_sign_blocks(options, files, counts)) as blocks:
            for block in blocks:
                run.remove_duplicates(block)
                on_progress(counts)
    return counts


def _sign_blocks(options: DedupOptions, files: Sequence[Path], counts: DedupCounts) -> Generator[SignedBlock]:
    def count_read_bytes(num_bytes: int) -> None:
        counts.read_bytes += num_bytes

    recipe = BlockSignerRecipe(
        paths=tuple(map(str, files)),
        json_key=options.json_key,
        ignores_whitespace=options.ignores_whitespace,
        near_duplicates=options.near_duplicates,
    )
    blocks = read_blocks(select_whole_files(files), (options.json_key,), on_bytes_read=count_read_bytes)

    def locate(position: Position) -> str:
        return f"{files[position.file_index]}:{position.num_records + 1}"

    # Digests alone are cheaper than sending texts to another process and back.
    num_workers = 1 if options.near_duplicates is None else options.num_workers
    return encode_in_order(blocks, lambda: recipe, num_workers, locate)


def _refuse_bad_outputs(options: DedupOptions, files: Sequence[Path]) -> None:
    problems = []
    outputs = {"output": options.output_path, "report": options.report_path}
    # The same file may be named by two paths, and writing it would destroy an input.
    inputs = {identify_file(path) for path in files}
    for flag, path in outputs.items():
        if path is None:
            continue
        if not path.name.endswith(OUTPUT_SUFFIXES):
            problems.append(
                f"{flag}: file name must end with {', '.join(OUTPUT_SUFFIXES)}, got {path}. Pass --{flag} {path}.jsonl."
            )
        if path.exists() and identify_file(path) in inputs:
            problems.append(
                f"{flag}: must not be one of the inputs, got {path}. "
                "Choose another name or, if an earlier run wrote it, move it away."
            )
    if options.report_path is not None and options.report_path.resolve() == options.output_path.resolve():
        problems.append(f"report: must differ from --output, got {options.report_path}. Choose another name.")
    if problems:
        raise ConfigError(*problems)


class _Run:
    """The open outputs of one run, and what it remembers of the documents so far."""

    def __init__(
        self,
        options: DedupOptions,
        files: Sequence[Path],
        output: BinaryIO,
        report: BinaryIO | None,
        counts: DedupCounts,
    ):
        self._files = files
        self._output = output
        self._report = report
        self._counts = counts
        self._occurrences = FirstOccurrences()
        self._signatures = None if options.near_duplicates is None else SignatureIndex(options.near_duplicates)

    def remove_duplicates(self, block: SignedBlock) -> None:
        """Write the documents that resemble no earlier one. Documents are identified by file number and line."""
        # One integer per document instead of two: there may be billions of them.
        first = block.file_index << LINE_BITS | block.first_line
        locations = np.arange(first, first + len(block.lines), dtype=np.int64)
        firsts = self._occurrences.add(block.digests, locations)
        # A document whose first occurrence is itself has no earlier equal.
        is_kept = firsts == locations
        self._counts.num_documents += len(locations)
        self._counts.num_exact_duplicates += int((~is_kept).sum())
        self._counts.text_bytes += int(block.text_bytes.sum())
        removals = {place: (int(firsts[place]), "exact", 1.0) for place in np.flatnonzero(~is_kept).tolist()}
        for place, match in self._find_near_duplicates(block, is_kept, locations):
            self._counts.num_near_duplicates += 1
            removals[place] = (match.key, "near", match.similarity)
            is_kept[place] = False
        self._counts.kept_text_bytes += int(block.text_bytes[is_kept].sum())
        self._output.write(b"".join(compress(block.lines, is_kept)))
        # In the order of the input, so that the report does not depend on which kind was found first.
        for place, removal in sorted(removals.items()):
            self._report_removed(int(locations[place]), *removal)

    def _find_near_duplicates(
        self, block: SignedBlock, is_new: np.ndarray, locations: np.ndarray
    ) -> list[tuple[int, Match]]:
        """Return the places of documents that resemble one that was kept; the others are remembered as kept."""
        if self._signatures is None or block.signatures is None:
            return []
        places = np.flatnonzero(is_new & block.is_signed)
        matches = self._signatures.keep_unlike(block.signatures[is_new[block.is_signed]], locations[places].tolist())
        return [(place, match) for place, match in zip(places.tolist(), matches, strict=True) if match is not None]

    def _report_removed(self, location: int, original: int, kind: str, similarity: float) -> None:
        if self._report is None:
            return
        row = {
            "removed": self._describe(location),
            "duplicate_of": self._describe(original),
            "kind": kind,
            "similarity": similarity,
        }
        self._report.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def _describe(self, location: int) -> str:
        return f"{self._files[location >> LINE_BITS]}:{location & ((1 << LINE_BITS) - 1)}"


class FirstOccurrences:
    """Where each digest was first met; 24 bytes per digest."""

    def __init__(self) -> None:
        self._locations = SortedRuns()

    def add(self, digests: np.ndarray, locations: np.ndarray) -> np.ndarray:
        """Return where each digest was first met, its own location if that is here: int64 [n].

        digests: [n] of DIGEST_DTYPE, in order of meeting; locations: int64 [n].
        """
        # Equal documents within this batch first, then those of earlier batches.
        unique, first_places, inverse = np.unique(digests, return_index=True, return_inverse=True)
        firsts = locations[first_places]
        is_new = np.ones(len(unique), dtype=bool)
        for places, known in self._locations.find(unique):
            firsts[places] = known
            is_new[places] = False
        # Only first occurrences are kept: a digest that is known needs no second entry.
        self._locations.add(unique[is_new], firsts[is_new])
        return firsts[inverse]


@contextmanager
def open_compressed(path: Path) -> Iterator[BinaryIO]:
    """Open a .jsonl, .jsonl.gz or .jsonl.zst, published when complete; the same content gives the same bytes."""
    with publish_file(path) as file:
        if path.name.endswith(".gz"):
            # Without a name and a time in the header, so that the same content gives the same bytes.
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=GZIP_LEVEL, mtime=0) as compressed:
                yield cast(BinaryIO, compressed)
        elif path.name.endswith(".zst"):
            with zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(file, closefd=False) as compressed:
                yield compressed
        else:
            yield file
