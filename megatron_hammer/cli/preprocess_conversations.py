"""Turn instruction data into token ids and loss masks for supervised fine-tuning, with a manifest beside them.

Inputs: alpaca, sharegpt, messages, question/answer and other pairs, one or many turns; .jsonl .json (also as .gz, .zst)
and .parquet; files, globs, directories. Writes <output-prefix>.{bin,idx,manifest.json} and
<output-prefix>_loss_mask.{bin,idx}. Look at the masks first: hammer show-chat-masks.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import TextColumn

from megatron_hammer.cli.tokenizer_export import add_chat_flags
from megatron_hammer.data.conversations.formats import FORMATS
from megatron_hammer.data.conversations.manifest import ConversationManifest
from megatron_hammer.data.preprocess.worker_pool import count_cores
from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.progress import build_byte_progress
from megatron_hammer.files.tables import print_json
from megatron_hammer.post_training.conversations.block_encoder import OVERLONG_POLICIES, RecordOptions
from megatron_hammer.post_training.conversations.preprocess import ConversationOptions, preprocess_conversations
from megatron_hammer.post_training.templates.chat_template import parse_bindings

MAX_PROBLEMS_SHOWN = 20


def add_template_flags(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """The flags that say how conversations are written: the tokenizer and the template, which may be optional."""
    parser.add_argument(
        "--tokenizer-model", type=Path, required=True, help="SentencePiece .model, tokenizer.json, or its folder"
    )
    add_chat_flags(parser, default=None if is_required else "that of the written conversations")


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how records are read."""
    parser.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto", help="of the records (auto: by the names of fields)"
    )
    parser.add_argument("--system", metavar="TEXT", help="for conversations without a system text (default: none)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help. Raises ConfigError if values contradict each other or are out of range."""
    parser = CommandParser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or directories")
    add_template_flags(parser)
    parser.add_argument("--output-prefix", type=parse_new_name, required=True, help="path of the outputs")
    add_record_flags(parser)
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="of a conversation (default: no limit)")
    parser.add_argument(
        "--overlong",
        choices=OVERLONG_POLICIES,
        help="what becomes of longer conversations: they are dropped, lose turns at their end, or are errors (drop)",
    )
    parser.add_argument(
        "--workers", type=int, default=count_cores(), help="encoding processes (one per core: %(default)s)"
    )
    parser.add_argument(
        "--max-errors", type=int, default=0, help="unusable records to leave out before stopping (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    arguments = parser.parse_args(argv)
    is_too_short = arguments.max_length is not None and arguments.max_length < 1
    if arguments.workers < 1 or arguments.max_errors < 0 or is_too_short:
        parser.error(
            "--workers and --max-length must be at least 1 and --max-errors at least 0, got "
            f"workers={arguments.workers}, max_length={arguments.max_length}, max_errors={arguments.max_errors}"
        )
    if arguments.overlong is not None and arguments.max_length is None:
        parser.error(f"--overlong must come with --max-length, got {arguments.overlong} alone")
    return arguments


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Dropped and shortened conversations go to stderr, the counts to stdout."""
    arguments = parse_arguments(argv)
    options = ConversationOptions(
        inputs=tuple(arguments.input),
        tokenizer_path=arguments.tokenizer_model,
        template=arguments.chat_template,
        bindings=parse_bindings(arguments.bind_token),
        output_prefix=arguments.output_prefix,
        records=RecordOptions(
            format=arguments.format,
            system=arguments.system,
            max_length=arguments.max_length,
            overlong=arguments.overlong or "drop",
        ),
        num_workers=arguments.workers,
        max_errors=arguments.max_errors,
    )
    started_at_s = time.monotonic()
    with build_byte_progress(TextColumn("{task.fields[counts]}")) as progress:
        task = progress.add_task("", total=None, counts="")
        manifest = preprocess_conversations(
            options,
            lambda done, total, count: progress.update(
                task, completed=done, total=total, counts=f"{count:,} conversations"
            ),
        )
    print_lines("dropped", manifest.problems)
    print_lines("shortened", manifest.shortened)
    if manifest.num_joined_answers:
        print(
            f"note: {manifest.num_joined_answers:,} answers begin with white space that the tokenizer joins to their "
            "header, so a model cannot begin so. Trim the answers, or use a template that does",
            file=sys.stderr,
        )
    if arguments.json:
        print_json(manifest.to_json())
    else:
        print(f"{summarise(options.output_prefix, manifest)}; {time.monotonic() - started_at_s:.1f} s")


def print_lines(word: str, lines: Sequence[str]) -> None:
    for line in lines[:MAX_PROBLEMS_SHOWN]:
        print(f"{word}: {line}", file=sys.stderr)
    if len(lines) > MAX_PROBLEMS_SHOWN:
        print(f"{word}: {len(lines) - MAX_PROBLEMS_SHOWN:,} more, listed in the manifest", file=sys.stderr)


def summarise(prefix: Path, manifest: ConversationManifest) -> str:
    """The last line: conversations in, out, dropped and why, and the tokens that are learned."""
    counts = manifest.num_dropped_by_reason.items()
    reasons = f" ({', '.join(f'{count:,} {reason}' for reason, count in counts)})" if counts else ""
    ignored = f", {len(manifest.ignored_files)} files of other types ignored" if manifest.ignored_files else ""
    learned = manifest.num_learned_tokens / manifest.num_tokens
    return (
        f"{prefix}: {manifest.num_records:,} conversations in, {manifest.num_documents:,} out, "
        f"{manifest.num_dropped_documents:,} dropped{reasons}, {len(manifest.shortened):,} shortened, "
        f"{manifest.num_without_last_answer:,} end without an answer{ignored}; {manifest.num_tokens:,} tokens as "
        f"{manifest.dtype}, {manifest.num_learned_tokens:,} of them learned ({learned:.1%})"
    )
