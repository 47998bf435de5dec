"""Build a small corpus for demonstrations from text found on this machine; nothing is downloaded."""

import argparse
from collections.abc import Sequence

from megatron_hammer.corpus.machine_text import build_machine_corpus
from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=parse_new_name, required=True, help="the .jsonl to write")
    parser.add_argument(
        "--max-bytes", type=int, default=12_000_000, help="stop after this many bytes of text (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="random seed of the order of documents (%(default)s)")
    parser.add_argument("--valid-output", type=parse_new_name, help="a second .jsonl for held-out documents")
    parser.add_argument(
        "--valid-ratio", type=float, default=0.02, help="share of documents held out, by hash (%(default)s)"
    )
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints what was written and, by cause, what was skipped."""
    arguments = parse_arguments(argv)
    corpus = build_machine_corpus(
        arguments.output,
        max_bytes=arguments.max_bytes,
        seed=arguments.seed,
        valid_output_path=arguments.valid_output,
        valid_ratio=arguments.valid_ratio,
    )
    print(f"{arguments.output}: {corpus.num_train_documents} documents, {corpus.train_bytes / 1e6:.2f} MB of text")
    if arguments.valid_output:
        print(f"{arguments.valid_output}: {corpus.num_valid_documents} documents, {corpus.valid_bytes / 1e6:.2f} MB")
    # Causes in alphabetical order: the same corpus gives the same lines.
    skipped = ", ".join(f"{count} {cause}" for cause, count in sorted(corpus.skipped.items())) or "none"
    num_documents = corpus.num_train_documents + corpus.num_valid_documents
    print(f"{num_documents + corpus.skipped.total()} documents found, {num_documents} written, skipped: {skipped}")
