"""Compare tokenizers: tokens needed, character coverage, fertility by script, and what a round trip loses.

hammer tokenizer analyze --tokenizers ours=ours.model theirs=theirs/ --input corpus/ --plot comparison.png
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.corpus.readers import Document, read_files
from megatron_hammer.errors import ConfigError, DataError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import build_byte_progress
from megatron_hammer.files.publish import PNG_MAGIC, begins_with, require_places
from megatron_hammer.files.tables import open_console, print_json
from megatron_hammer.tokenizer.analysis import analysis_files, analysis_report, analyze
from megatron_hammer.tokenizer.vocabulary.coverage import read_character_levels


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--tokenizers",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="SentencePiece .model files, tokenizer.json files, or folders that hold one",
    )
    parser.add_argument("--input", nargs="+", default=[], help="the corpus: files, globs or directories")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="field that holds the text (%(default)s)")
    parser.add_argument(
        "--charset", type=Path, help='measure coverage of {"level": {"texts": ["一", ...]}} in this file'
    )
    parser.add_argument(
        "--reference", metavar="NAME", help="tokenizer by whose counts the others are divided (default: the first)"
    )
    parser.add_argument(
        "--max-bytes", type=int, help="use a random sample of documents of this many bytes (default: all)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="random seed of the sample (%(default)s)")
    parser.add_argument("--csv", type=Path, help="write one row per tokenizer to this file")
    parser.add_argument("--plot", type=Path, help="draw the comparison into this PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, {"seed": "max_bytes", "max_bytes": "input", "json_keys": "input"})
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Raises ConfigError without --input and --charset, DataError for an empty corpus."""
    arguments = parse_arguments(argv)
    started_at_s = time.monotonic()
    if not arguments.input and arguments.charset is None:
        raise ConfigError("--input: a corpus or a --charset must be given, got neither. Pass what to measure.")
    if arguments.max_bytes is not None and arguments.max_bytes <= 0:
        raise ConfigError(
            f"--max-bytes: must be positive, got {arguments.max_bytes}. Leave it out for all of the text."
        )
    require_places((arguments.plot, begins_with(PNG_MAGIC)), (arguments.csv, begins_with(analysis_files.CSV_BEGIN)))
    named_paths = [analyze.parse_named_tokenizer(text) for text in arguments.tokenizers]
    encoders = analyze.load_named_tokenizers(named_paths, arguments.reference)
    levels = read_character_levels(arguments.charset) if arguments.charset else None
    with open_documents(arguments) as documents:
        analysis = analyze.analyze_tokenizers(encoders, documents, levels=levels, reference=arguments.reference)
    # A --max-bytes below the first document gives an empty sample.
    if arguments.input and not analysis.scripts:
        raise DataError(
            f"{arguments.input[0]}: inputs must hold a document, got none (max-bytes={arguments.max_bytes}). "
            "Add one, or raise --max-bytes beyond the size of a document."
        )
    # Files before tables: a reader of stdout that leaves early must not cost them.
    if arguments.csv:
        analysis_files.write_csv(analysis, arguments.csv)
    if arguments.plot:
        analysis_files.write_plot(analysis, arguments.plot)
    if arguments.json:
        print_json(analysis_report.describe_analysis(analysis))
        return
    analysis_report.print_analysis(analysis, open_console())
    print(analysis_report.summarise_analysis(analysis, time.monotonic() - started_at_s))


@contextmanager
def open_documents(arguments: argparse.Namespace) -> Iterator[Iterable[Document]]:
    """The documents to analyze, with a bar on a terminal's stderr that follows the bytes read from disk."""
    if not arguments.input:
        yield ()
        return
    # Bytes on disk, because the reader reports these also for compressed files.
    files = find_input_files(arguments.input).files
    total_bytes = sum(path.stat().st_size for path in files)
    with build_byte_progress() as bar:
        task = bar.add_task("", total=total_bytes)
        # Read lazily, so a corpus need not fit in memory.
        documents: Iterable[Document] = read_files(
            files, arguments.json_keys, lambda num_bytes: bar.advance(task, num_bytes)
        )
        if arguments.max_bytes is not None:
            documents = analyze.sample_documents(documents, max_bytes=arguments.max_bytes, seed=arguments.seed)
        yield documents
