"""Raw text to Megatron's .bin/.idx: read, encode in a pool of processes, write in order.

The output depends on the inputs, the tokenizer and the options only, never on the number of workers; for good input it
has the same bytes as that of Megatron-LM's tool. A bad record is an error naming file:line. A worker that dies is an
error, not a wait. Until everything is written, every file carries a .partial name.
Not here: shuffling, sentence splitting, resuming, sharing a job between machines.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.data.atomic_files import open_atomically
from megatron_hammer.data.indexed import IndexedWriter, idx_path, select_dtype
from megatron_hammer.data.input_files import InputFiles
from megatron_hammer.data.manifest import (
    Manifest,
    TokenizerIdentity,
    describe_source,
    encode_manifest,
    manifest_path,
    read_tool_version,
)
from megatron_hammer.data.readers import Record, decode_record, find_input_files, read_records
from megatron_hammer.errors import DataError, PlatformError
from megatron_hammer.tokenizer.encoder import Encoder, load_encoder, require_eod_id

# Small enough to keep all workers busy on a small corpus, large enough that sending a batch costs nothing beside it.
BATCH_BYTES = 256 * 1024
BATCH_RECORDS = 1024
BATCHES_IN_FLIGHT_PER_WORKER = 3
MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessOptions:
    """One run of the preprocessor; each of `json_keys` becomes `<output_prefix>_<key>_document`."""

    inputs: tuple[str, ...]
    tokenizer_path: Path
    output_prefix: Path
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    num_workers: int = 1
    max_errors: int = 0

    def prefix_of(self, json_key: str) -> Path:
        return Path(f"{self.output_prefix}_{json_key}_document")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run has come; `read_bytes` counts input files as they lie on disk, of `total_bytes`."""

    read_bytes: int
    total_bytes: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class EncodedField:
    """One field of a batch of records: ids [sum of lengths], in the output's dtype; lengths [num_documents] int64."""

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The fields of a batch in the order of `json_keys`, and a sentence for each record that was dropped."""

    fields: tuple[EncodedField, ...]
    problems: tuple[str, ...]


class BatchEncoder:
    """Records to ids; made once in each worker, because reading a tokenizer is slow."""

    def __init__(self, options: PreprocessOptions, encoder: Encoder):
        self._encoder = encoder
        self._json_keys = options.json_keys
        self._dtype = select_dtype(encoder.vocab_size)
        self._suffix = np.array([require_eod_id(encoder)] if options.append_eod else [], dtype=self._dtype)

    def encode(self, records: Sequence[Record]) -> EncodedBatch:
        documents: list[tuple[str, ...]] = []
        problems: list[str] = []
        for record in records:
            try:
                documents.append(decode_record(record, self._json_keys))
            except DataError as error:
                problems.extend(error.problems)
        fields = tuple(self._encode_field([texts[k] for texts in documents]) for k in range(len(self._json_keys)))
        return EncodedBatch(fields, tuple(problems))

    def _encode_field(self, texts: Sequence[str]) -> EncodedField:
        ids = [self._encode_text(text) for text in texts]
        lengths = np.array([len(document) for document in ids], dtype=np.int64)
        all_ids = np.concatenate(ids) if ids else np.empty(0, dtype=self._dtype)
        return EncodedField(all_ids, lengths, sum(len(text.encode("utf-8")) for text in texts))

    def _encode_text(self, text: str) -> np.ndarray:
        ids = self._encoder.encode(text).astype(self._dtype)
        return np.concatenate((ids, self._suffix)) if len(ids) else ids  # no lone end-of-document token, as Megatron


def preprocess(
    options: PreprocessOptions, on_progress: Callable[[Progress], None] = lambda progress: None
) -> dict[Path, Manifest]:
    """Write one .bin/.idx/.manifest.json for each key and return the manifests by output prefix.

    Raises DataError for anything wrong with inputs, tokenizer, records or disk, and PlatformError if a worker dies;
    then nothing that this run wrote remains.
    """
    encoder = load_encoder(options.tokenizer_path)
    if options.append_eod:
        require_eod_id(encoder)
    input_files = find_input_files(options.inputs)
    with ExitStack() as stack:
        dtype = select_dtype(encoder.vocab_size)
        writers = [stack.enter_context(IndexedWriter(options.prefix_of(key), dtype)) for key in options.json_keys]
        run = _Run(options, writers, input_files)
        batches = batch_records(read_records(input_files.files, options.json_keys, run.count_read_bytes))
        # closing: an error in this loop must end the workers before the files go
        for encoded in stack.enter_context(closing(encode_in_order(batches, options, encoder))):
            run.write(encoded)
            on_progress(run.progress())
        run.refuse_empty()
        manifests = run.describe(encoder)
        run.publish(manifests)
    return manifests


def batch_records(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records by size; a record larger than a batch is one of its own."""
    batch: list[Record] = []
    batch_bytes = 0
    for record in records:
        batch.append(record)
        # a parsed row has no cheap size; 1 KiB keeps such batches near a quarter of a MiB of short texts
        batch_bytes += len(record.payload) if isinstance(record.payload, bytes) else 1024
        if batch_bytes >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def encode_in_order(
    batches: Iterable[list[Record]], options: PreprocessOptions, encoder: Encoder
) -> Generator[EncodedBatch]:
    """Yield the encoded batches in the order of the input; with one worker, in this process.

    Only a few batches wait at any time, so memory does not grow with the input.
    Raises PlatformError as soon as a worker has died.
    """
    if options.num_workers == 1:
        batch_encoder = BatchEncoder(options, encoder)
        yield from (batch_encoder.encode(batch) for batch in batches)
        return
    # spawn: a fork would copy whatever threads the caller has, in whatever state they are
    pool = ProcessPoolExecutor(
        options.num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(options,)
    )
    in_flight: deque[tuple[Future[EncodedBatch], Record]] = deque()
    try:
        for batch in batches:
            with _blocked_interrupts():  # submit may start a worker, which inherits the mask
                in_flight.append((pool.submit(_encode_in_worker, batch), batch[0]))
            if len(in_flight) >= options.num_workers * BATCHES_IN_FLIGHT_PER_WORKER:
                yield in_flight.popleft()[0].result()
        while in_flight:
            yield in_flight.popleft()[0].result()
    except BrokenProcessPool as error:
        where = f" near {in_flight[0][1].source}:{in_flight[0][1].line}" if in_flight else ""
        raise PlatformError(
            f"workers: every worker must live to the end, got one that died{where}. "
            "It was killed, most often for want of memory; pass fewer --workers or use a machine with more memory."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; workers leave it to the parent, where it waits for this block."""
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


_worker_encoder: BatchEncoder | None = None


def _start_worker(options: PreprocessOptions) -> None:
    global _worker_encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = BatchEncoder(options, load_encoder(options.tokenizer_path))


def _exit_with_parent() -> None:
    """A worker waits on its queue for ever if the parent is killed, so it watches the parent too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(records: list[Record]) -> EncodedBatch:
    assert _worker_encoder is not None  # set by the pool's initializer
    return _worker_encoder.encode(records)


class _Run:
    """The open outputs of one run and what has been counted so far; the lists follow `json_keys`."""

    def __init__(self, options: PreprocessOptions, writers: list[IndexedWriter], input_files: InputFiles):
        self._options = options
        self._writers = writers
        self._input_files = input_files
        self._sizes_bytes = [path.stat().st_size for path in input_files.files]
        self._read_bytes = 0
        self._text_bytes = [0] * len(writers)
        self._num_empty_documents = [0] * len(writers)
        self._problems: list[str] = []

    def write(self, encoded: EncodedBatch) -> None:
        self._problems.extend(encoded.problems)
        if len(self._problems) > self._options.max_errors:
            raise self._too_many_errors()
        for k, (writer, field) in enumerate(zip(self._writers, encoded.fields, strict=True)):
            writer.add_documents(field.ids, field.lengths)
            self._text_bytes[k] += field.text_bytes
            self._num_empty_documents[k] += int((field.lengths == 0).sum())

    def count_read_bytes(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes

    def progress(self) -> Progress:
        return Progress(
            read_bytes=self._read_bytes,
            total_bytes=sum(self._sizes_bytes),
            num_documents=self._writers[0].num_documents,
            num_tokens=sum(writer.num_tokens for writer in self._writers),
        )

    def refuse_empty(self) -> None:
        for writer, key in zip(self._writers, self._options.json_keys, strict=True):
            if writer.num_tokens == 0:
                raise DataError(
                    f'{self._options.inputs[0]}: field "{key}" must hold text in some document, '
                    f"got none in {writer.num_documents} documents. Check --input and --json-keys."
                )

    def describe(self, encoder: Encoder) -> dict[Path, Manifest]:
        """Hash the inputs and return a manifest for each output; raises DataError if an input changed meanwhile."""
        sources = tuple(describe_source(path) for path in self._input_files.files)
        for source, size_bytes in zip(sources, self._sizes_bytes, strict=True):
            if source.size_bytes != size_bytes:
                raise DataError(
                    f"{source.path}: file must not change while it is read, got {size_bytes} bytes at the start and "
                    f"{source.size_bytes} at the end. Run again when it is complete."
                )
        tokenizer = TokenizerIdentity(name=encoder.path.name, sha256=encoder.sha256, vocab_size=encoder.vocab_size)
        return {
            writer.prefix: Manifest(
                sources=sources,
                ignored_files=tuple(str(path) for path in self._input_files.ignored),
                tokenizer=tokenizer,
                options={"json_key": self._options.json_keys[k], "append_eod": self._options.append_eod},
                dtype=writer.dtype.name,
                num_documents=writer.num_documents,
                num_tokens=writer.num_tokens,
                text_bytes=self._text_bytes[k],
                num_empty_documents=self._num_empty_documents[k],
                problems=tuple(self._problems),
                tool_version=read_tool_version(),
            )
            for k, writer in enumerate(self._writers)
        }

    def publish(self, manifests: dict[Path, Manifest]) -> None:
        """Complete every file, then rename: an old .idx goes first and the new one comes last.

        A crash at any point leaves no pair that opens with a manifest of another run.
        """
        with ExitStack() as stack:
            for writer in self._writers:
                writer.finish()
                file = stack.enter_context(open_atomically(manifest_path(writer.prefix)))
                file.write(encode_manifest(manifests[writer.prefix]))
                file.flush()
            for writer in self._writers:
                idx_path(writer.prefix).unlink(missing_ok=True)
        for writer in self._writers:
            writer.publish()

    def _too_many_errors(self) -> DataError:
        shown = self._problems[:MAX_PROBLEMS_SHOWN]
        return DataError(
            *shown,
            f"max-errors: at most {self._options.max_errors} bad records are allowed, "
            f"got at least {len(self._problems)} ({len(shown)} shown). "
            "Repair them, or raise --max-errors to skip such records and list them in the manifest.",
        )
