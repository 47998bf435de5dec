"""Join .bin/.idx pairs into one: the shards of a preprocessing job in their order, or other pairs in the given order.

    hammer merge-data --input 'data/corpus-*_text_document' --output-prefix data/corpus_text_document

All parts must have the same dtype, tokenizer and options, and all shards of a job must be there. Merged shards are
identical to the .bin, .idx and manifest of the job run as a whole; with --shuffle, to that job run with --shuffle.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from megatron_hammer.data.merge.merge_pairs import MergedPair, merge_pairs
from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.progress import build_byte_progress
from megatron_hammer.files.tables import print_json

DEFAULT_SEED = 1234


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help. Exits with 2 if values contradict each other or are out of range."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help="prefixes of pairs, .idx files, globs of either, or directories"
    )
    parser.add_argument(
        "--output-prefix", type=parse_new_name, required=True, help="path of the result without .bin or .idx"
    )
    parser.add_argument("--shuffle", action="store_true", help="put the documents of all parts in random order")
    parser.add_argument("--seed", type=int, default=None, help=f"random seed of --shuffle ({DEFAULT_SEED})")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, {"seed": "shuffle"})
    if arguments.shuffle and arguments.seed is None:
        arguments.seed = DEFAULT_SEED
    # numpy's generators refuse a negative seed, with a message that does not name the flag.
    if arguments.seed is not None and arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got seed={arguments.seed}")
    return arguments


@exit_on_interrupt("incomplete files were removed")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the parts in and the documents and tokens out; warnings go to stderr."""
    arguments = parse_arguments(argv)
    # monotonic: the wall clock may be set while the command runs.
    started_at_s = time.monotonic()
    merged = merge_with_progress(arguments)
    elapsed_s = time.monotonic() - started_at_s
    for warning in merged.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.json:
        print_json(merged.to_json() | {"elapsed_s": elapsed_s})
    else:
        print(summarise(merged, elapsed_s))


def merge_with_progress(arguments: argparse.Namespace) -> MergedPair:
    """Run with a live line on the terminal's stderr; where stderr is a file, it stays silent."""
    with build_byte_progress() as bar:
        task = bar.add_task("", total=None)
        return merge_pairs(
            arguments.input,
            arguments.output_prefix,
            seed=arguments.seed,
            # The total is known once the headers of the parts are read.
            on_progress=lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes),
        )


def summarise(merged: MergedPair, elapsed_s: float) -> str:
    parts = "1 part" if len(merged.parts) == 1 else f"{len(merged.parts):,} parts"
    return (
        f"{merged.prefix}: {parts} in; {merged.num_documents:,} documents, {merged.num_sequences:,} sequences, "
        f"{merged.num_tokens:,} tokens as {merged.dtype} out, 0 dropped; {elapsed_s:.1f} s"
    )
