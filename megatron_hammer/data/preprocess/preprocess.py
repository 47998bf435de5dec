"""Raw text to Megatron's .bin/.idx: read, encode in a pool of processes, write in order, shuffle if asked.

The output depends on the inputs, the tokenizer and the options only: not on the number of workers, and not on how often
the run was killed and continued. For valid input it has the bytes of Megatron-LM's tool, but for what template.py says.
A bad record is an error that names file:line; a dead worker is an error and never a hang. Until everything is written,
every file has a .partial name.
Read next: blocks.py (reading), block_encoder.py (what workers do), run.py (writing), journal.py (resuming).
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hammer.corpus.blocks import Position, count_records_before, read_blocks
from megatron_hammer.data.indexed.file_hasher import HASH_CHUNK_BYTES, FileHasher
from megatron_hammer.data.indexed.manifest import Manifest
from megatron_hammer.data.indexed.pair import select_dtype
from megatron_hammer.data.preprocess.block_encoder import BlockEncoderRecipe, require_bos_id
from megatron_hammer.data.preprocess.build_manifest import (
    Sources,
    describe_job,
    describe_outputs,
    find_complete_outputs,
    select_sources,
)
from megatron_hammer.data.preprocess.journal import (
    InputState,
    Job,
    Journal,
    lock_outputs,
    read_journal,
    refuse_other_job,
)
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.run import PreprocessRun, remove_leftovers
from megatron_hammer.data.preprocess.template import Template, describe_differences, select_template
from megatron_hammer.data.preprocess.worker_pool import encode_in_order
from megatron_hammer.errors import ConfigError, DataError, HammerError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, HuggingFaceEncoder, load_encoder, require_eod_id
from megatron_hammer.tokenizer.encoding.fast_encoder import select_encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessProgress:
    """How far a run has come, in bytes of input files as they lie on disk, or of tokens that are shuffled."""

    is_shuffling: bool = False
    done_bytes: int
    total_bytes: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PreprocessResult:
    """The manifests by output prefix.

    was_complete: they were there already and nothing was written. was_continued: an earlier run had done a part.
    """

    manifests: dict[Path, Manifest]
    was_complete: bool = False
    was_continued: bool = False


class VoidRunError(DataError):
    """The inputs changed during the run, or hold no text: there is nothing to continue."""


OnProgress = Callable[[PreprocessProgress], None]
OnNote = Callable[[str], None]


def preprocess(
    options: PreprocessOptions,
    on_progress: OnProgress = lambda progress: None,
    on_note: OnNote = lambda note: None,
) -> PreprocessResult:
    """Write one .bin/.idx/.manifest.json for each key, or continue a run that was stopped.

    on_note: gets a sentence that the user should read. Raises DataError for anything wrong with inputs, tokenizer,
    records or disk, ConfigError for flags, PlatformError if a worker dies. Then, and after KeyboardInterrupt, what the
    journal counts is kept for the next run with the same options; without a journal nothing that was written remains.
    """
    options.validate()
    # Before any output is touched and any worker starts: a wrong tokenizer is found at once.
    encoder = load_encoder(options.tokenizer_path)
    refuse_other_kind(encoder, options.tokenizer_type)
    template = select_template(encoder, options)
    for note in describe_differences(encoder, options):
        on_note(note)
    if options.append_eod:
        require_eod_id(encoder)
    if options.prepend_bos:
        require_bos_id(encoder)
    sources = select_sources(options)
    job = describe_job(options, encoder, sources)
    # Two runs with the same outputs would write into the same partial files.
    with lock_outputs(options.lock_path):
        if options.restart:
            remove_leftovers(options)
        journal = read_journal(options.journal_path)
        if journal is not None:
            refuse_other_job(options.journal_path, journal.job, job)
            on_note(f"{options.journal_path}: going on with an unfinished run, {describe_place(journal)}.")
        elif not options.restart and (complete := find_complete_outputs(options, encoder, sources)) is not None:
            remove_leftovers(options)  # left by a run that was killed while it removed them
            return PreprocessResult(complete, was_complete=True)
        run = PreprocessRun(options, job, select_dtype(encoder.vocab_size), journal)
        task = _Task(options, encoder, template, sources, job, run, on_progress, on_note)
        return PreprocessResult(task.complete(), was_continued=journal is not None)


def refuse_other_kind(encoder: Encoder, tokenizer_type: str | None) -> None:
    """Raise ConfigError if Megatron's --tokenizer-type names another kind of tokenizer than the one that was read."""
    if tokenizer_type is None:
        return
    is_hugging_face = isinstance(encoder, HuggingFaceEncoder)
    if is_hugging_face != (tokenizer_type == "HuggingFaceTokenizer"):
        kind = "a Hugging Face tokenizer" if is_hugging_face else "a SentencePiece model"
        raise ConfigError(
            f"tokenizer-type: must be the kind of --tokenizer-model, got {tokenizer_type} for {encoder.path}, {kind}. "
            "Drop the flag, or pass the other file."
        )


def describe_place(journal: Journal) -> str:
    """Return in words how far a run had come."""
    num_documents = f"{journal.writers[0].num_documents:,} documents"
    done = {"encode": "encoded", "shuffle": "encoded and to be shuffled", "publish": "complete"}
    return f"{num_documents} {done[journal.phase]}"


@dataclass(slots=True)
class _Task:
    """The phases of one run; a continued run may start at any of them."""

    options: PreprocessOptions
    encoder: Encoder
    template: Template
    sources: Sources
    job: Job
    run: PreprocessRun
    on_progress: OnProgress
    on_note: OnNote
    read_bytes: int = 0
    hashed_at_bytes: int = 0
    num_files_done: int = 0
    records_before: dict[int, int] = field(default_factory=dict)

    def complete(self) -> dict[Path, Manifest]:
        try:
            if self.run.phase == "publish":
                self.run.finish()
                return self.run.publish()
            with FileHasher() as hasher:
                if self.run.phase == "encode":
                    self._encode(hasher)
                self._refuse_void_run()
                if self.options.seed is not None:
                    self.run.begin_shuffle()
                    self.run.shuffle(self.options.seed, self._report)
                return self.run.publish(self._describe(hasher))
        # Also for Ctrl-C: whoever stops a run may want to continue it.
        except BaseException as error:
            is_kept = self.run.keep_or_remove(is_void=isinstance(error, VoidRunError))
            # The same class of error, so that the exit code stays, and one more sentence: how to continue.
            if is_kept and isinstance(error, HammerError):
                raise type(error)(*error.problems, explain_resume(self.options)) from error
            raise

    def _encode(self, hasher: FileHasher) -> None:
        """Read, encode and write everything from the run's position on."""
        blocks = read_blocks(
            self.sources.slices,
            self.options.json_keys,
            start=self.run.position,
            on_bytes_read=self._count_read_bytes,
            block_bytes=self.options.block_bytes,
        )
        # closing: an error in this loop must end the workers before the files are removed
        with closing(
            encode_in_order(blocks, self._build_recipe, self.options.num_workers, self._locate)
        ) as encoded_blocks:
            for encoded in encoded_blocks:
                # Written before the journal counts it, or a kill in between would leave a hole.
                self.run.add(encoded, self._locate)
                self.run.save_if_due()
                self._hash_what_is_done(hasher)
                self._report(self.read_bytes, self.sources.total_bytes)

    def _build_recipe(self) -> BlockEncoderRecipe:
        """Choose the encoder by the tokenizer alone: shards of one job must not choose by their own documents."""
        choice = select_encoder(self.encoder)
        if choice.warning is not None:
            self.on_note(choice.warning)
        return BlockEncoderRecipe(self.options, choice, self.template)

    def _describe(self, hasher: FileHasher) -> list[Manifest]:
        output_paths = self.run.finish()
        described = hasher.finish([*self.sources.paths, *output_paths])
        num_sources = len(self.sources.paths)
        return describe_outputs(
            self.options, self.encoder, self.sources, self.run, described[:num_sources], described[num_sources:]
        )

    def _hash_what_is_done(self, hasher: FileHasher) -> None:
        """Hash files that will not change any more, while the system still has them in memory."""
        # Every small file is a block, and the thread that hashes would be woken for each of them.
        if self.read_bytes - self.hashed_at_bytes < HASH_CHUNK_BYTES:
            return
        self.hashed_at_bytes = self.read_bytes
        position = self.run.position
        # Only what is new since the last time: there may be many thousands of files.
        hasher.complete(self.sources.paths[self.num_files_done : position.file_index])
        self.num_files_done = position.file_index
        if position.offset:  # for archives and rows the offset counts other bytes, but the pace is close enough
            hasher.follow(self.sources.paths[position.file_index], position.offset)
        if self.options.seed is None:  # else it is shuffled into another file
            for path, num_bytes in self.run.list_growing_files():
                hasher.follow(path, num_bytes)

    def _refuse_void_run(self) -> None:
        """Raise VoidRunError if nothing that has been written can be of use, to this run or to a later one."""
        # At the end and not per file: a file may be appended to after it has been read.
        for state in self.job.inputs:
            try:
                now = InputState.of(Path(state.path))
            except FileNotFoundError as error:
                raise VoidRunError(
                    f"{state.path}: file must stay while it is read, got none at the end. Put it back."
                ) from error
            if now != state:
                change = f"{state.size_bytes} bytes at the start and {now.size_bytes} at the end"
                # Two equal sizes would not explain the refusal.
                if now.size_bytes == state.size_bytes:
                    change = "one that was modified meanwhile"
                raise VoidRunError(
                    f"{state.path}: file must not change while it is read, got {change}. Run again when it is complete."
                )
        for writer, key in zip(self.run.writers, self.options.json_keys, strict=True):
            # A shard may be empty: a large archive belongs whole to one shard.
            if writer.num_tokens == 0 and self.options.shard is None:
                raise VoidRunError(
                    f'{self.options.inputs[0]}: field "{key}" must hold text in some document, '
                    f"got none in {writer.num_documents} documents. Check --input and --json-keys."
                )

    def _locate(self, begin: Position, place: int = 0) -> str:
        """Return file:line of the document that lies `place` documents after a position."""
        # Counted only where a message needs it: it reads the file up to the slice.
        if begin.file_index not in self.records_before:
            self.records_before[begin.file_index] = count_records_before(self.sources.slices[begin.file_index])
        line = self.records_before[begin.file_index] + begin.num_records + place + 1
        return f"{self.sources.slices[begin.file_index].path}:{line}"

    def _count_read_bytes(self, num_bytes: int) -> None:
        self.read_bytes += num_bytes

    def _report(self, done_bytes: int, total_bytes: int) -> None:
        self.on_progress(
            PreprocessProgress(
                is_shuffling=self.run.phase == "shuffle",
                done_bytes=min(done_bytes, total_bytes),
                total_bytes=total_bytes,
                num_documents=self.run.writers[0].num_documents,
                num_tokens=sum(writer.num_tokens for writer in self.run.writers),
            )
        )


def explain_resume(options: PreprocessOptions) -> str:
    """Return the sentence for a run that was stopped and can be continued."""
    return f"{options.journal_path}: what was done is kept. Run the same command again to continue."
