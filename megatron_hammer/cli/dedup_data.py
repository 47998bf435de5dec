"""Drop duplicate documents from raw text: equal ones, and with --near-duplicates also those that are almost equal.

Inputs: the same as those of preprocess-data. The first document of every set of duplicates is kept, in input order.
A kept JSON line is copied unchanged. From a Parquet row or a text file, only the text is kept.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import TextColumn

from megatron_hammer.data.dedup.deduplicate import DedupCounts, DedupOptions, deduplicate
from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions, removal_probability
from megatron_hammer.data.preprocess.worker_pool import count_cores
from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.progress import build_byte_progress
from megatron_hammer.files.tables import print_json

# Around the usual thresholds of 0.7 to 0.9, where the chance rises from near 0 to near 1.
SHOWN_SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help. Exits with 2 if --workers is below 1."""
    defaults = NearDuplicateOptions()
    parser = CommandParser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or directories")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="field that holds the text (%(default)s)")
    parser.add_argument("--output", type=parse_new_name, required=True, help=".jsonl, .jsonl.gz or .jsonl.zst to write")
    parser.add_argument(
        "--report", type=Path, help="write one line per removed document to this file: .jsonl, .gz or .zst"
    )
    parser.add_argument(
        "--ignore-whitespace", action="store_true", help="treat texts that differ only in white space as equal"
    )
    parser.add_argument("--near-duplicates", action="store_true", help="also drop documents that are almost equal")
    near = parser.add_argument_group("near duplicates")
    near.add_argument(
        "--threshold", type=float, default=defaults.threshold, help="smallest share of common n-grams (%(default)s)"
    )
    near.add_argument(
        "--ngram", type=int, default=defaults.ngram, help="words or Chinese characters per n-gram (%(default)s)"
    )
    near.add_argument(
        "--num-permutations", type=int, default=defaults.num_permutations, help="values per signature (%(default)s)"
    )
    near.add_argument(
        "--workers",
        type=int,
        default=count_cores(),
        help="processes that compute signatures (one per core: %(default)s)",
    )
    # The permutations depend on the seed alone, so that the same command removes the same documents.
    near.add_argument("--seed", type=int, default=defaults.seed, help="random seed of the permutations (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, dict.fromkeys(("threshold", "ngram", "num_permutations", "seed"), "near_duplicates"))
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    return arguments


@exit_on_interrupt("incomplete files were removed")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the counts in, kept and removed."""
    arguments = parse_arguments(argv)
    near = NearDuplicateOptions(
        threshold=arguments.threshold,
        num_permutations=arguments.num_permutations,
        ngram=arguments.ngram,
        seed=arguments.seed,
    )
    options = DedupOptions(
        inputs=tuple(arguments.input),
        output_path=arguments.output,
        json_key=arguments.json_keys,
        ignores_whitespace=arguments.ignore_whitespace,
        near_duplicates=near if arguments.near_duplicates else None,
        num_workers=arguments.workers,
        report_path=arguments.report,
    )
    # monotonic: the wall clock may be set while the command runs.
    started_at_s = time.monotonic()
    counts = deduplicate_with_progress(options)
    elapsed_s = time.monotonic() - started_at_s
    # The options of this run, so that the user sees what its threshold means in practice.
    chances = {s: removal_probability(s, near) for s in SHOWN_SIMILARITIES} if arguments.near_duplicates else {}
    if arguments.json:
        result = dataclasses.asdict(counts) | {"num_kept": counts.num_kept, "elapsed_s": elapsed_s}
        # JSON has only strings as keys.
        result["removal_probability"] = {str(similarity): chance for similarity, chance in chances.items()}
        print_json(result)
        return
    if chances:
        listed = ", ".join(f"{similarity:g}: {chance:.1%}" for similarity, chance in chances.items())
        print(f"chance that a document is removed, by its similarity to a kept one: {listed}")
    print(summarise(arguments.output, counts, elapsed_s))


def deduplicate_with_progress(options: DedupOptions) -> DedupCounts:
    """Run with a live line on the terminal's stderr; where stderr is a file, it stays silent."""
    with build_byte_progress(TextColumn("{task.fields[counts]}")) as bar:
        # The total is known once the inputs are found.
        task = bar.add_task("", total=None, counts="")

        def show(counts: DedupCounts) -> None:
            shown = f"{counts.num_documents:,} documents, {counts.num_kept:,} kept"
            bar.update(task, completed=counts.read_bytes, total=counts.input_bytes, counts=shown)

        return deduplicate(options, show)


def summarise(output_path: Path, counts: DedupCounts, elapsed_s: float) -> str:
    ignored = f"{len(counts.ignored_files)} files of other types ignored; " if counts.ignored_files else ""
    return (
        f"{output_path}: {counts.num_documents:,} documents in, {counts.num_kept:,} kept, "
        f"{counts.num_exact_duplicates:,} exact and {counts.num_near_duplicates:,} near duplicates removed; "
        f"{counts.text_bytes / 1e6:.1f} MB of text in, {counts.kept_text_bytes / 1e6:.1f} MB kept; "
        f"{ignored}{elapsed_s:.1f} s, {counts.text_bytes / elapsed_s / 1e6:.1f} MB/s"
    )
