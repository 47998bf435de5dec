"""Instruction data to stored conversations: read, render and encode in a pool of processes, write in order.

The output depends on the inputs, the tokenizer, the template and the options, and not on the number of workers. Nothing
is left out or shortened without a line in the manifest. Until everything is written, every file has a .partial name.
Read next: data/conversations/formats.py (records), templates/chat_tokenizer.py (ids and masks), block_encoder.py.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hammer.corpus.blocks import BLOCK_BYTES, Block, Position, read_blocks, select_whole_files
from megatron_hammer.corpus.input_files import InputFiles, find_input_files, match_outputs, show_path
from megatron_hammer.data.conversations.manifest import ConversationManifest, TemplateIdentity
from megatron_hammer.data.conversations.pair import ConversationWriter
from megatron_hammer.data.conversations.records import ALL_COLUMNS
from megatron_hammer.data.indexed.manifest import describe_source, read_tool_version
from megatron_hammer.data.indexed.pair import select_dtype
from megatron_hammer.data.preprocess.build_manifest import identify_tokenizer
from megatron_hammer.data.preprocess.journal import InputState, lock_outputs
from megatron_hammer.data.preprocess.worker_pool import encode_in_order
from megatron_hammer.errors import DataError
from megatron_hammer.post_training.conversations.block_encoder import (
    TOO_LONG,
    BlockEncoderRecipe,
    ConversationBlockEncoder,
    EncodedBlock,
    RecordOptions,
)
from megatron_hammer.post_training.templates.chat_template import load_chat_template
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.post_training.templates.proof import prove_template

MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationOptions:
    """One run. template: a shipped name or a Jinja file, with `bindings` of its control tokens to others.

    max_errors: records to leave out; those that are too long are not counted where `records.overlong` drops them.
    """

    inputs: tuple[str, ...]
    tokenizer_path: Path
    template: str
    bindings: Mapping[str, str] = field(default_factory=dict)
    output_prefix: Path
    records: RecordOptions = field(default_factory=RecordOptions)
    num_workers: int = 1
    max_errors: int = 0
    block_bytes: int = BLOCK_BYTES

    def describe(self) -> dict[str, object]:
        """Return every option that shapes the bytes, by the name of its flag."""
        return dataclasses.asdict(self.records) | {"bind_token": dict(self.bindings)}

    def build_output_test(self) -> Callable[[Path], bool]:
        """Return the test for files that a run with this prefix writes, which are no inputs."""
        name = re.escape(self.output_prefix.name)
        suffixes = r"(_loss_mask)?\.(bin|idx|lengths|documents|manifest\.json|lock)(\.partial)?"
        return match_outputs(self.output_prefix.parent, name + suffixes)


def preprocess_conversations(
    options: ConversationOptions, on_progress: Callable[[int, int, int], None] = lambda done, total, count: None
) -> ConversationManifest:
    """Write the conversations of all inputs and return their manifest; an older set of the same prefix is replaced.

    on_progress: gets bytes read, bytes of all inputs and conversations written. Raises ConfigError for a template that
    does not fulfil what proof.py asks for, DataError for inputs, tokenizer and records, OutputError for the disk.
    """
    template = load_chat_template(options.template, options.bindings)
    tokenizer = ChatTokenizer(options.tokenizer_path, template)
    end_of_turn_ids = prove_template(tokenizer)
    files = find_input_files(options.inputs, options.build_output_test())
    before = [InputState.of(path) for path in files.files]
    with (
        lock_outputs(Path(f"{options.output_prefix}.lock")),
        ConversationWriter(options.output_prefix, select_dtype(tokenizer.encoder.vocab_size)) as writer,
    ):
        totals = _write(options, tokenizer, files, writer, on_progress)
        if not writer.num_conversations:
            raise DataError(
                f"{options.inputs[0]}: inputs must hold a conversation that can be used, got none in "
                f"{totals.num_records:,} records{totals.explain()}. Check --input and --format."
            )
        outputs = [describe_source(path).sha256 for path in writer.finish()]
        sources = tuple(describe_source(path) for path in files.files)
        if changed := [state.path for state in before if state != InputState.of(Path(state.path))]:
            raise DataError(f"{changed[0]}: file must not change while it is read, got a change. Run again.")
        manifest = ConversationManifest(
            sources=sources,
            ignored_files=tuple(map(show_path, files.ignored)),
            tokenizer=identify_tokenizer(tokenizer.encoder),
            options=options.describe(),
            dtype=writer.dtype.name,
            num_documents=writer.num_conversations,
            num_sequences=writer.num_conversations,
            num_tokens=writer.num_tokens,
            text_bytes=totals.text_bytes,
            num_empty_documents=0,
            problems=tuple(totals.problems),
            bin_sha256=outputs[0],
            idx_sha256=outputs[1],
            mask_bin_sha256=outputs[2],
            mask_idx_sha256=outputs[3],
            tool_version=read_tool_version(),
            template=TemplateIdentity(
                name=template.name,
                sha256=template.sha256,
                text=template.text,
                end_of_turn_ids=end_of_turn_ids,
                bound_tokens=template.bound_tokens,
            ),
            num_records=totals.num_records,
            num_learned_tokens=writer.num_learned_tokens,
            num_dropped_by_reason=dict(sorted(totals.reasons.items())),
            shortened=tuple(totals.shortened),
            num_without_last_answer=totals.num_without_last_answer,
            num_joined_answers=totals.num_joined_answers,
        )
        writer.publish(manifest)
    return manifest


@dataclass(slots=True)
class _Totals:
    """What the blocks add up to."""

    num_records: int = 0
    text_bytes: int = 0
    num_without_last_answer: int = 0
    num_joined_answers: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)

    def add(self, block: EncodedBlock, locate: Callable[[Position, int], str]) -> None:
        self.num_records += len(block.lengths) + len(block.dropped)
        self.text_bytes += block.text_bytes
        self.num_without_last_answer += block.num_without_last_answer
        self.num_joined_answers += block.num_joined_answers
        self.reasons.update(reason for _, reason, _ in block.dropped)
        self.problems += [f"{locate(block.begin, place)}: {sentence}" for place, _, sentence in block.dropped]
        self.shortened += [f"{locate(block.begin, place)}: {sentence}" for place, sentence in block.shortened]

    def explain(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.reasons.items()))
        return f" ({reasons}; the first: {self.problems[0]})" if reasons else ""


def _write(
    options: ConversationOptions,
    tokenizer: ChatTokenizer,
    files: InputFiles,
    writer: ConversationWriter,
    on_progress: Callable[[int, int, int], None],
) -> _Totals:
    """Read, encode and write everything; raises DataError once more records are unusable than `max_errors`."""
    totals = _Totals()
    slices = select_whole_files(files.files)
    total_bytes = sum(part.size_bytes for part in slices)
    num_bytes = 0

    def count_bytes(count: int) -> None:
        nonlocal num_bytes
        num_bytes += count

    def locate(begin: Position, place: int = 0) -> str:
        return f"{slices[begin.file_index].path}:{begin.num_records + place + 1}"

    def prepare() -> Callable[[], Callable[[Block], EncodedBlock]]:
        if options.num_workers == 1:  # in this process, which has the tokenizer already
            return lambda: ConversationBlockEncoder(options.records, tokenizer).encode
        return BlockEncoderRecipe(options.records, options.tokenizer_path, tokenizer.template)

    blocks = read_blocks(slices, ALL_COLUMNS, on_bytes_read=count_bytes, block_bytes=options.block_bytes)
    # closing: an error in this loop must end the workers before the files are removed
    with closing(encode_in_order(blocks, prepare, options.num_workers, locate)) as encoded_blocks:
        for encoded in encoded_blocks:
            totals.add(encoded, locate)
            _refuse_too_many(options, totals)
            writer.add(encoded.ids, encoded.mask, encoded.lengths)
            on_progress(min(num_bytes, total_bytes), total_bytes, writer.num_conversations)
    return totals


def _refuse_too_many(options: ConversationOptions, totals: _Totals) -> None:
    allowed = totals.reasons[TOO_LONG] if options.records.overlong != "error" else 0
    num_errors = totals.reasons.total() - allowed
    if num_errors > options.max_errors:
        raise DataError(
            *totals.problems[:MAX_PROBLEMS_SHOWN],
            f"max-errors: at most {options.max_errors} unusable records are allowed, got at least {num_errors}. "
            "Repair them, or raise --max-errors to leave such records out and list them in the manifest.",
        )
