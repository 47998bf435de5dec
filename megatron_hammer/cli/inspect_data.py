"""Inspect .bin/.idx pairs: counts, lengths, token frequencies, duplicates, text, integrity.

For several pairs it also counts the documents that they share, such as validation data that leaked into training.
--document and --search show nothing else. They and --samples need the tokenizer that encoded the pair.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from megatron_hammer.data.indexed.manifest import read_manifest
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.inspect.document_text import (
    choose_samples,
    describe_ids,
    read_document,
    require_same_tokenizer,
    search_documents,
)
from megatron_hammer.data.inspect.length_histogram import (
    CSV_HEADER,
    build_histogram,
    plot_histogram,
    write_histogram_csv,
)
from megatron_hammer.data.inspect.statistics import inspect_pair
from megatron_hammer.data.inspect.tables import (
    FrequentToken,
    PairReport,
    find_common_documents,
    print_common_documents,
    print_pair_report,
    report_to_json,
)
from megatron_hammer.data.inspect.verify_pair import VerifiedPair, verify_pair
from megatron_hammer.errors import ConfigError, DataError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import build_progress
from megatron_hammer.files.publish import PNG_MAGIC, begins_with, require_places
from megatron_hammer.files.tables import print_json
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder

OnProgress = Callable[[int, int], None]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a pair without .bin or .idx")
    parser.add_argument(
        "--tokenizer-model", type=Path, help="show tokens as text: .model, tokenizer.json, or its folder"
    )
    parser.add_argument("--verify", action="store_true", help="check every byte of both files first")
    parser.add_argument("--top", type=int, default=20, help="most frequent tokens to show (%(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="random documents to show as text (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="random seed of --samples (%(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG of the length histogram to write")
    parser.add_argument("--csv", type=Path, help="CSV of the length histogram to write")
    parser.add_argument("--document", type=int, metavar="N", help="print document N, from 0, and nothing else")
    parser.add_argument("--search", metavar="TEXT", help="list the documents that contain TEXT, and nothing else")
    parser.add_argument("--max-matches", type=int, default=20, help="stop the search after this many (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, {"seed": "samples", "max_matches": "search"})
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Raises ConfigError for flags that cannot work, DataError for a damaged pair."""
    arguments = parse_arguments(argv)
    validate_arguments(arguments)
    encoder = load_encoder(arguments.tokenizer_model) if arguments.tokenizer_model is not None else None
    # First: what follows trusts the files, and would show a damaged pair as if it were sound.
    verified = verify_pairs(arguments, encoder)
    # validate_arguments refuses both flags without a tokenizer, so there is an encoder in these two cases.
    if arguments.document is not None and encoder is not None:
        show_document(arguments, encoder)
    elif arguments.search is not None and encoder is not None:
        show_matches(arguments, encoder)
    else:
        show_reports(
            [build_pair_report(prefix, arguments, encoder, verified) for prefix in arguments.prefixes], arguments
        )


def validate_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError naming every flag that cannot work."""
    problems = []
    for name, least in (("top", 0), ("samples", 0), ("max_matches", 1)):
        value = getattr(arguments, name)
        if value < least:
            flag = name.replace("_", "-")
            problems.append(f"{flag}: must be at least {least}, got {value}. Pass --{flag} {max(least, 10)}.")
    shows_text = {
        "samples": arguments.samples > 0,
        "document": arguments.document is not None,
        "search": arguments.search is not None,
    }
    needs_text = [flag for flag, is_wanted in shows_text.items() if is_wanted]
    if needs_text and arguments.tokenizer_model is None:
        problems.append(
            f"tokenizer-model: must be given to show text (--{needs_text[0]}), got none. "
            "Pass the tokenizer that encoded the pair."
        )
    if arguments.document is not None and arguments.search is not None:
        problems.append("document: cannot be combined with --search, got both. Drop one of them.")
    # Each names one file or one number, which would be ambiguous with several pairs.
    for flag in ("plot", "csv", "document"):
        if len(arguments.prefixes) > 1 and getattr(arguments, flag) is not None:
            problems.append(f"{flag}: must be of one pair, got {len(arguments.prefixes)}. Pass one prefix.")
        # Both print documents and nothing else, so no histogram would be written.
        if flag != "document" and getattr(arguments, flag) is not None:
            problems += [
                f"{flag}: cannot be combined with --{other}, got both. Drop one of them."
                for other in ("document", "search")
                if getattr(arguments, other) is not None
            ]
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        problems.append(f"plot: file name must end with .png, got {arguments.plot}. Rename it.")
    if problems:
        raise ConfigError(*problems)
    require_places((arguments.plot, begins_with(PNG_MAGIC)), (arguments.csv, begins_with(CSV_HEADER)))


def verify_pairs(arguments: argparse.Namespace, encoder: Encoder | None) -> dict[str, VerifiedPair]:
    """Read every byte where --verify asks for it; raises DataError with the problems of all pairs."""
    if not arguments.verify:
        return {}
    vocab_size = encoder.vocab_size if encoder is not None else None
    verified = {}
    for prefix in arguments.prefixes:
        with show_progress(f"verifying {prefix}", "bytes") as on_progress:
            verified[prefix] = verify_pair(prefix, vocab_size=vocab_size, on_progress=on_progress)
    problems = [problem for pair in verified.values() for problem in pair.problems]
    if problems:
        raise DataError(*problems)
    return verified


def build_pair_report(
    prefix: str, arguments: argparse.Namespace, encoder: Encoder | None, verified: dict[str, VerifiedPair]
) -> PairReport:
    """Read one pair for its report; raises DataError if the given tokenizer is not the one that encoded it."""
    index, manifest = read_index(prefix), read_manifest(prefix)
    # The ids that never occur are counted of the vocabulary, so its size must be known.
    vocab_size = manifest.tokenizer.vocab_size if manifest is not None else None
    if encoder is not None:
        require_same_tokenizer(prefix, encoder, manifest)
        vocab_size = encoder.vocab_size
    with show_progress(f"reading {prefix}", "tokens") as on_progress:
        statistics = inspect_pair(index, vocab_size=vocab_size, on_progress=on_progress)
    frequent = statistics.select_frequent_ids(arguments.top)
    # Without a tokenizer the table has ids only.
    texts = describe_ids(encoder, [token_id for token_id, _ in frequent]) if encoder else [None] * len(frequent)
    numbers = choose_samples(index, arguments.samples, arguments.seed)
    return PairReport(
        prefix=prefix,
        statistics=statistics,
        vocab_size=vocab_size,
        manifest=manifest,
        verified=verified.get(prefix),
        frequent_tokens=[
            FrequentToken(token_id=token_id, count=count, text=text)
            for (token_id, count), text in zip(frequent, texts, strict=True)
        ],
        samples=[read_document(index, encoder, number) for number in numbers] if encoder is not None else [],
    )


def show_reports(reports: list[PairReport], arguments: argparse.Namespace) -> None:
    """Print the reports, the documents that pairs share, and a last line with the sums; write --csv and --plot."""
    # --csv and --plot are of one pair; `validate_arguments` has refused more.
    lengths = reports[0].statistics.lengths
    # Files before tables: a reader of stdout that leaves early must not cost them.
    if arguments.csv is not None:
        write_histogram_csv(arguments.csv, build_histogram(lengths))
    if arguments.plot is not None:
        plot_histogram(arguments.plot, lengths, f"{reports[0].prefix}: {len(lengths):,} documents")
    common = find_common_documents(reports)
    if arguments.json:
        pairs = [report_to_json(report) for report in reports]
        print_json({"pairs": pairs, "common_documents": [dataclasses.asdict(row) for row in common]})
        return
    for report in reports:
        print_pair_report(report, sys.stdout)
    print_common_documents(common, sys.stdout)
    num_documents = sum(report.statistics.index.num_documents for report in reports)
    num_tokens = sum(report.statistics.index.num_tokens for report in reports)
    num_duplicates = sum(report.statistics.duplicates.num_duplicates for report in reports)
    num_empty = sum(report.statistics.num_empty_documents for report in reports)
    written = "".join(f"; wrote {path}" for path in (arguments.plot, arguments.csv) if path is not None)
    print(
        f"{len(reports)} pairs, {num_documents:,} documents, {num_tokens:,} tokens, {num_duplicates:,} duplicates "
        f"within a pair, {num_empty:,} empty{', verified' if arguments.verify else ''}{written}"
    )


def show_document(arguments: argparse.Namespace, encoder: Encoder) -> None:
    """Print the text of --document."""
    # One pair, as `validate_arguments` requires.
    (prefix,) = arguments.prefixes
    index = read_index(prefix)
    require_same_tokenizer(prefix, encoder, read_manifest(prefix))
    document = read_document(index, encoder, arguments.document)
    if arguments.json:
        print_json({"prefix": prefix} | dataclasses.asdict(document))
        return
    print(document.text)
    print(
        f"{prefix}: document {document.number:,} of {index.num_documents:,}, {document.num_tokens:,} tokens, "
        f"{len(document.text):,} characters"
    )


def show_matches(arguments: argparse.Namespace, encoder: Encoder) -> None:
    """Print the places where --search is found, and how many documents were searched."""
    results = []
    for prefix in arguments.prefixes:
        index = read_index(prefix)
        require_same_tokenizer(prefix, encoder, read_manifest(prefix))
        matches = list(search_documents(index, encoder, arguments.search, max_matches=arguments.max_matches))
        # It may have ended at the last document by chance: "stopped" then says no more than that there may be others.
        has_stopped = len(matches) == arguments.max_matches
        # The search stops at the last match that it may show, so documents after it were not read.
        num_searched = matches[-1].number + 1 if has_stopped else index.num_documents
        results.append({"prefix": prefix, "num_searched_documents": num_searched, "has_stopped": has_stopped})
        results[-1]["matches"] = [dataclasses.asdict(match) for match in matches]
        if not arguments.json:
            for match in matches:
                print(f"{prefix}: document {match.number:,}, character {match.position:,}: {match.excerpt}")
    if arguments.json:
        print_json({"pairs": results})
        return
    num_matches = sum(len(result["matches"]) for result in results)
    num_searched = sum(result["num_searched_documents"] for result in results)
    stopped = " (stopped at --max-matches)" if any(result["has_stopped"] for result in results) else ""
    print(f"{num_matches:,} documents contain {arguments.search!r}, of {num_searched:,} searched{stopped}")


@contextmanager
def show_progress(what: str, unit: str) -> Iterator[OnProgress]:
    """A live line on the terminal's stderr; where stderr is a file, it stays silent."""
    columns = (
        # No markup: rich would read brackets in a path as a style.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit),
        TimeRemainingColumn(),
    )
    with build_progress(*columns) as bar:
        task = bar.add_task(what, total=0)
        yield lambda done, total: bar.update(task, completed=done, total=total)
