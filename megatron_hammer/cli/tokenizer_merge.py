"""Extend a SentencePiece BPE tokenizer with pieces of another; the ids of the base never change.

--mode characters (HammerLLM's way): the characters of --required-chars-file that only the other model has, with scores
calibrated by the mean ratio of scores over the shared characters, then the symbols as user-defined pieces.
--mode vocabulary (the way of tiny-llm-zh and Chinese-LLaMA): every piece of the other model, then the symbols.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.publish import require_places
from megatron_hammer.files.tables import build_table, open_console, print_json
from megatron_hammer.tokenizer.encoding.sentencepiece_model import SentencePieceModel, is_sentencepiece_model
from megatron_hammer.tokenizer.vocabulary.merge_vocabularies import (
    MergeReport,
    merge_characters,
    merge_vocabulary,
    read_bpe_model,
    select_own_requirements,
    select_own_symbols,
    write_merged_model,
)
from megatron_hammer.tokenizer.vocabulary.vocabulary_files import (
    describe_suspicious_symbols,
    read_required_levels,
    read_user_defined_symbols,
)

ZERO_SCORES_WARNING = (
    "warning: pieces with a score of 0 merge before all others, in the order of the text. No Hugging Face tokenizer "
    "can express this, so the export of this model is refused. Use --scores calibrated unless you need the recipe."
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the .model to extend")
    parser.add_argument("--other", type=Path, required=True, help="the .model whose pieces are added")
    parser.add_argument("--output", type=parse_new_name, required=True, help="the .model to write")
    parser.add_argument("--mode", choices=("characters", "vocabulary"), default="characters", help="(%(default)s)")
    parser.add_argument(
        "--required-chars-file",
        type=Path,
        help="UTF-8 text, or JSON in levels of which the first calibrates (default: those of the other model)",
    )
    parser.add_argument(
        "--user-defined-symbols-file",
        type=Path,
        help="one symbol per line (default in mode characters: the other model's own symbols)",
    )
    parser.add_argument(
        "--scores",
        choices=("calibrated", "zero"),
        default="calibrated",
        help="scores of the pieces that --mode vocabulary adds; tiny-llm-zh uses zero (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints what was added; warnings go to stderr."""
    arguments = parse_arguments(argv)
    validate_arguments(arguments)
    base, other = read_bpe_model(arguments.base), read_bpe_model(arguments.other)
    symbols = select_symbols(arguments, other)
    model, report = merge(arguments, base, other, symbols)
    write_merged_model(arguments.output, model)
    # Warnings do not stop the merge: such a symbol may be meant.
    for warning in describe_suspicious_symbols(symbols):
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.mode == "vocabulary" and arguments.scores == "zero":
        print(ZERO_SCORES_WARNING, file=sys.stderr)
    if arguments.json:
        facts = {"output": str(arguments.output), "mode": arguments.mode, "normalizer": describe_normalizer(model)}
        facts |= dataclasses.asdict(report)
        print_json(facts)
    else:
        print_merge_report(arguments, model, report)


def validate_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError naming every flag that does not fit --mode, and an output that is one of the inputs."""
    problems = []
    if arguments.mode == "vocabulary" and arguments.required_chars_file:
        problems.append(
            "required-chars-file: must be left out of --mode vocabulary, which adds every piece, "
            f"got {arguments.required_chars_file}. Leave it out, or use --mode characters."
        )
    # In this mode the scores are always calibrated, so the flag would be ignored.
    if arguments.mode == "characters" and arguments.scores == "zero":
        problems.append(
            "scores: must be calibrated in --mode characters, got scores=zero. Leave it out, or use --mode vocabulary."
        )
    # resolve(), so that a link or another spelling of the path is recognised too.
    if arguments.output.resolve() in (arguments.base.resolve(), arguments.other.resolve()):
        problems.append(
            f"output: must not be one of the models that are merged, got {arguments.output}. Choose another name."
        )
    if problems:
        raise ConfigError(*problems)
    require_places((arguments.output, is_sentencepiece_model))


def select_symbols(arguments: argparse.Namespace, other: SentencePieceModel) -> tuple[str, ...]:
    if arguments.user_defined_symbols_file:
        return read_user_defined_symbols(arguments.user_defined_symbols_file)
    # Mode vocabulary adds every piece, and the other model's symbols are among them.
    return select_own_symbols(other) if arguments.mode == "characters" else ()


def merge(
    arguments: argparse.Namespace, base: SentencePieceModel, other: SentencePieceModel, symbols: tuple[str, ...]
) -> tuple[SentencePieceModel, MergeReport]:
    """The merged model and a report of what was added, as --mode says."""
    if arguments.mode == "vocabulary":
        return merge_vocabulary(base, other, symbols, scores=arguments.scores)
    if arguments.required_chars_file:
        levels = read_required_levels(arguments.required_chars_file)
    else:
        # Without a file, the other model's own characters are what it requires.
        levels = select_own_requirements(other, arguments.other)
    return merge_characters(base, other, levels, symbols)


def describe_normalizer(model: SentencePieceModel) -> dict[str, bool]:
    return {
        # SentencePiece stores its normalisation rules compiled in this field; empty means no normalisation.
        "is_identity": not model.precompiled_charsmap,
        "has_dummy_prefix": model.has_dummy_prefix,
        "removes_extra_whitespaces": model.removes_extra_whitespaces,
        "has_byte_fallback": model.has_byte_fallback,
    }


def print_merge_report(arguments: argparse.Namespace, model: SentencePieceModel, report: MergeReport) -> None:
    """Print the report as sentences; the last line has the number of pieces before and after."""
    if report.levels:
        print_levels(report)
    # With --scores zero nothing was calibrated.
    if report.score_ratio is None:
        print("scores of added pieces: 0")
    else:
        print(
            f"score ratio: {report.score_ratio}, the mean of base / other "
            f"over {report.num_shared_characters:,} shared characters"
        )
    print(
        f"symbols: {len(report.added_symbols):,} added, {len(report.retyped_symbols):,} that the base had as ordinary "
        f"pieces made user-defined with their old ids, {len(report.present_symbols):,} already present"
    )
    facts = ", ".join(f"{name}={value}" for name, value in describe_normalizer(model).items())
    print(f"settings of the base, kept: {facts}")
    num_characters, num_pieces = len(report.added_characters), len(report.added_pieces)
    added = f"{num_pieces:,} pieces" if arguments.mode == "vocabulary" else f"{num_characters:,} characters"
    print(
        f"{arguments.output}: {report.num_base_pieces:,} pieces of {arguments.base.name} + {report.num_added:,} added "
        f"({added}, {len(report.added_symbols):,} symbols) = {report.num_pieces:,} pieces"
    )


def print_levels(report: MergeReport) -> None:
    rows = []
    for row in report.levels:
        counts = (row.num_characters, row.num_in_base, row.num_added, row.num_in_neither)
        rows.append((row.level, *(f"{count:,}" for count in counts)))
    columns = ("required characters", "number", "in the base", "added", "in neither")
    open_console().print(build_table(None, columns, rows))
