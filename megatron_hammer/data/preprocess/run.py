"""The open outputs of one run of the preprocessor, and the journal that counts what is in them.

They end in one of three ways: published under their names, kept under .partial names with a journal for the
next run, or removed.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_hammer.corpus.blocks import Position
from megatron_hammer.data.indexed.manifest import Manifest, encode_manifest, manifest_path
from megatron_hammer.data.indexed.pair import bin_path, idx_path, read_index
from megatron_hammer.data.indexed.pair_writer import IndexedWriter, remove_partial_files
from megatron_hammer.data.indexed.shuffle import shuffle_pairs
from megatron_hammer.data.preprocess.block_encoder import EncodedBlock
from megatron_hammer.data.preprocess.journal import Job, Journal, Phase, write_journal
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.errors import DataError, OutputError
from megatron_hammer.files.publish import partial_path, publish_files

# One wrong --json-keys makes every record a problem.
MAX_PROBLEMS_SHOWN = 20


class PreprocessRun:
    """Counts and writers of a run; the lists follow `json_keys`. A new run, or the continuation of `journal`.

    Raises DataError if what the journal counts is not on the disk.
    """

    def __init__(self, options: PreprocessOptions, job: Job, dtype: np.dtype, journal: Journal | None):
        self._options = options
        self._job = job
        self._dtype = dtype
        self._prefixes = [options.prefix_of(key) for key in options.json_keys]
        num_keys = len(self._prefixes)
        self.phase: Phase = journal.phase if journal else "encode"
        self.position = journal.position if journal else Position()
        self.text_bytes = list(journal.text_bytes) if journal else [0] * num_keys
        self.num_empty_documents = list(journal.num_empty_documents) if journal else [0] * num_keys
        self.problems = list(journal.problems) if journal else []
        self._manifests = journal.manifests if journal else ()
        self._has_journal = journal is not None
        self._saved_at_s = time.monotonic()
        if journal is None:
            remove_leftovers(options)
        self.writers: list[IndexedWriter] = []
        for k, prefix in enumerate(self._select_prefixes(self.phase)):
            self.writers.append(IndexedWriter(prefix, dtype, journal.writers[k] if journal else None))

    def add(self, encoded: EncodedBlock, locate: Callable[[Position, int], str]) -> None:
        """Write a block. locate: the file:line of the document at a place in the block that begins at a position.

        Raises DataError when there are more bad records than `max_errors`.
        """
        self.problems += [f"{locate(encoded.begin, place)}: {problem}" for place, problem in encoded.problems]
        # Before the block is written: a run that ends here must not count its documents.
        if len(self.problems) > self._options.max_errors:
            raise self._too_many_errors()
        for k, (writer, field) in enumerate(zip(self.writers, encoded.fields, strict=True)):
            writer.add_documents(field.ids, field.sequence_lengths, field.sequences_per_document)
            self.text_bytes[k] += field.text_bytes
            self.num_empty_documents[k] += int((field.sequences_per_document == 0).sum())
        # Last: the journal must not pass a block of which only some keys are written.
        self.position = encoded.end

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved_at_s >= self._options.journal_interval_s:
            self.save()

    def save(self) -> None:
        """Sync everything to the disk, then record it in the journal."""
        journal = Journal(
            job=self._job,
            phase=self.phase,
            position=self.position,
            # `finish` has synced these already
            writers=tuple(writer.state if self.phase == "publish" else writer.sync() for writer in self.writers),
            text_bytes=tuple(self.text_bytes),
            num_empty_documents=tuple(self.num_empty_documents),
            problems=tuple(self.problems),
            manifests=self._manifests,
        )
        write_journal(self._options.journal_path, journal)
        self._has_journal = True
        self._saved_at_s = time.monotonic()

    def begin_shuffle(self) -> None:
        """Everything is encoded; from now on a kill loses only the shuffle."""
        self.phase = "shuffle"
        self.save()

    def shuffle(self, seed: int, on_progress: Callable[[int, int], None]) -> None:
        """Replace the writers by those of the shuffled documents."""
        spools = self.writers
        for spool in spools:
            spool.finish()
        sources = [read_index(spool.prefix, is_partial=True) for spool in spools]
        self.writers = []
        try:
            for prefix in self._prefixes:
                self.writers.append(IndexedWriter(prefix, self._dtype))
            work_dir = select_shuffle_dir(self._options)
            shuffle_pairs(sources, self.writers, seed=seed, work_dir=work_dir, on_progress=on_progress)
        except BaseException:
            for writer in self.writers:
                writer.abort()
            # What is encoded is kept: the next run shuffles again from it.
            self.writers = spools
            raise

    def list_growing_files(self) -> list[tuple[Path, int]]:
        """Each .bin that is being written, and how many of its bytes have left this process's buffers."""
        return [(partial_path(bin_path(writer.prefix)), writer.num_bytes_in_bin) for writer in self.writers]

    def finish(self) -> list[Path]:
        """Complete the pairs under their .partial names; returns each .bin and .idx, in the order of the keys."""
        for writer in self.writers:
            writer.finish()
        return [partial_path(path(prefix)) for prefix in self._prefixes for path in (bin_path, idx_path)]

    def publish(self, manifests: Sequence[Manifest] | None = None) -> dict[Path, Manifest]:
        """Give everything its name, with these manifests or those of the journal, and forget the run.

        The old .idx files go first and the new ones come last: a crash at any point leaves no pair that opens with a
        manifest of another run, and the next run continues here.
        """
        if manifests is not None:
            # In the journal first: after a kill, the next run publishes these without hashing everything again.
            self._manifests = tuple(manifests)
            self.phase = "publish"
            self.save()
        written = dict(zip(self._prefixes, self._manifests, strict=True))
        for prefix, manifest in written.items():
            if partial_path(bin_path(prefix)).exists():  # else this pair is the new one already
                idx_path(prefix).unlink(missing_ok=True)
            publish_files({manifest_path(prefix): encode_manifest(manifest)})
        for writer in self.writers:
            writer.publish()
        remove_leftovers(self._options)
        return written

    def keep_or_remove(self, *, is_void: bool) -> bool:
        """After an error: keep what the journal counts for the next run, or remove everything if that is of no use.

        Returns whether there is something to continue.
        """
        is_kept = self._has_journal and not is_void
        for writer in self.writers:
            with suppress(OutputError):  # on a full disk
                writer.close() if is_kept else writer.abort()
        if not is_kept:
            remove_leftovers(self._options)
        return is_kept

    def _select_prefixes(self, phase: Phase) -> list[Path]:
        # What waits to be shuffled lies under a prefix of its own. Once it is shuffled, the final pair is all there is.
        is_spooled = self._options.seed is not None and phase != "publish"
        return [select_spool_prefix(prefix) for prefix in self._prefixes] if is_spooled else self._prefixes

    def _too_many_errors(self) -> DataError:
        shown = self.problems[:MAX_PROBLEMS_SHOWN]
        return DataError(
            *shown,
            f"max-errors: at most {self._options.max_errors} bad records are allowed, "
            f"got at least {len(self.problems)} ({len(shown)} shown). "
            "Repair them, or raise --max-errors to skip such records and list them in the manifest.",
        )


def select_spool_prefix(prefix: Path) -> Path:
    """Return the prefix of the documents that wait to be shuffled."""
    return Path(f"{prefix}.unshuffled")


def select_shuffle_dir(options: PreprocessOptions) -> Path:
    return Path(f"{options.job_prefix}.shuffle.partial")


def remove_leftovers(options: PreprocessOptions) -> None:
    """Remove the journal and everything unfinished that a run with these names leaves behind."""
    options.journal_path.unlink(missing_ok=True)
    partial_path(options.journal_path).unlink(missing_ok=True)
    for prefix in (options.prefix_of(key) for key in options.json_keys):
        partial_path(manifest_path(prefix)).unlink(missing_ok=True)
        remove_partial_files(prefix)
        remove_partial_files(select_spool_prefix(prefix))
    shutil.rmtree(select_shuffle_dir(options), ignore_errors=True)
