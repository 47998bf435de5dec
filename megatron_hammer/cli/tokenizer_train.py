"""Train a SentencePiece BPE tokenizer on the same kinds of input as preprocess-data.

Several sources are weighted as in Megatron's --data-path: --input 0.7 zh/*.jsonl.zst 0.3 en/
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.errors import ConfigError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.progress import build_byte_progress, build_progress
from megatron_hammer.files.publish import require_places
from megatron_hammer.files.tables import print_json
from megatron_hammer.tokenizer.encoding.sentencepiece_model import is_sentencepiece_model
from megatron_hammer.tokenizer.vocabulary.recipes import RECIPES, TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import TextSource, count_fitting_bytes, parse_sources
from megatron_hammer.tokenizer.vocabulary.train import TrainedTokenizer, train_tokenizer
from megatron_hammer.tokenizer.vocabulary.vocabulary_files import (
    describe_suspicious_symbols,
    read_required_chars,
    read_user_defined_symbols,
)

# About 4 GB of memory at sentencepiece's 20 bytes per byte of the sample.
DEFAULT_MAX_BYTES = 200_000_000


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="[WEIGHT] PATH",
        help="files, globs or directories; a number before a path is the weight of the paths up to the next number",
    )
    parser.add_argument("--output", type=parse_new_name, required=True, help="the .model to write")
    parser.add_argument(
        "--preset", choices=sorted(RECIPES), default="hammerllm-128k", help="settings to start from (%(default)s)"
    )
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="field that holds the text (%(default)s)")
    parser.add_argument("--vocab-size", type=int, help="number of pieces (default: the preset's)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        help="share of the text's characters that get their own piece; the rest become bytes (default: the preset's)",
    )
    parser.add_argument("--required-chars-file", type=Path, help="every character of this text or JSON gets a piece")
    parser.add_argument("--user-defined-symbols-file", type=Path, help="every line of this file becomes one piece")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=DEFAULT_MAX_BYTES,
        help="train on a random sample of this much text; training takes about 20 times this memory (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="random seed of the sample (%(default)s)")
    parser.add_argument(
        "--num-threads", type=int, default=2, help="training threads; they do not change the result (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the sample and the result; warnings go to stderr."""
    arguments = parse_arguments(argv)
    # Before the input is read: reading a large corpus takes minutes.
    validate_arguments(arguments)
    # monotonic: the wall clock may be set while the command runs.
    started_at_s = time.monotonic()
    recipe, sources = build_recipe(arguments), parse_sources(arguments.input)
    for warning in describe_suspicious_symbols(recipe.user_defined_symbols):
        print(f"warning: {warning}", file=sys.stderr)
    with show_progress(sources) as callbacks:
        trained = train_tokenizer(
            sources,
            arguments.output,
            recipe,
            json_key=arguments.json_keys,
            max_bytes=arguments.max_bytes,
            seed=arguments.seed,
            num_threads=arguments.num_threads,
            **callbacks,
        )
    warn_of_shortfalls(trained)
    elapsed_s = time.monotonic() - started_at_s
    if arguments.json:
        facts = {"preset": arguments.preset, "recipe": dataclasses.asdict(recipe), **dataclasses.asdict(trained)}
        print_json(facts | {"path": str(trained.path), "seed": arguments.seed, "elapsed_s": elapsed_s})
    else:
        print_summary(recipe, trained, elapsed_s)


def validate_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError naming every number that is out of range."""
    coverage = arguments.character_coverage
    # The ranges of character_coverage and num_threads are those that sentencepiece accepts.
    checks = [
        (arguments.vocab_size is None or arguments.vocab_size > 0, "vocab-size: must be positive", "vocab_size"),
        (coverage is None or 0.98 <= coverage <= 1, "character-coverage: must be from 0.98 to 1", "character_coverage"),
        (arguments.max_bytes > 0, "max-bytes: must be positive", "max_bytes"),
        (1 <= arguments.num_threads <= 1024, "num-threads: must be from 1 to 1024", "num_threads"),
    ]
    problems = [
        f"{rule}, got {name}={getattr(arguments, name)}. Change it." for is_met, rule, name in checks if not is_met
    ]
    if problems:
        raise ConfigError(*problems)
    require_places((arguments.output, is_sentencepiece_model))


def build_recipe(arguments: argparse.Namespace) -> TokenizerRecipe:
    """The preset with what was asked for besides."""
    chars_path, symbols_path = arguments.required_chars_file, arguments.user_defined_symbols_file
    changes: dict[str, Any] = {
        "vocab_size": arguments.vocab_size,
        "character_coverage": arguments.character_coverage,
        "required_chars": read_required_chars(chars_path) if chars_path else None,
        "user_defined_symbols": read_user_defined_symbols(symbols_path) if symbols_path else None,
    }
    # None: not given, so the preset decides.
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(RECIPES[arguments.preset], **changes)


@contextmanager
def show_progress(sources: tuple[TextSource, ...]) -> Iterator[dict[str, Any]]:
    """Yield train_tokenizer's callbacks; a live line on the terminal's stderr, nothing where stderr is a file."""
    files = find_input_files([item for source in sources for item in source.inputs]).files
    bar = build_byte_progress(TimeElapsedColumn(), has_description=True)
    training = build_progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    reading = bar.add_task("reading", total=sum(path.stat().st_size for path in files))

    def start_training(sampled_bytes: int) -> None:
        bar.stop()
        # sentencepiece reports no progress, so there is a spinner and no bar.
        training.add_task(f"training on {sampled_bytes / 1e6:.1f} MB", total=None)
        training.start()

    bar.start()
    try:
        yield {"on_bytes_read": lambda num_bytes: bar.advance(reading, num_bytes), "on_training": start_training}
    finally:
        bar.stop()
        training.stop()


def warn_of_shortfalls(trained: TrainedTokenizer) -> None:
    """Name on stderr each source that has less text than its weight asks for."""
    # A single source has the whole sample as its share, and is used whole where it is smaller.
    if len(trained.sources) == 1:
        return
    # The largest sample in which every source can have the share of its weight.
    fitting_bytes = count_fitting_bytes(trained.sources)
    for source in trained.sources:
        if source.shortfall_bytes:
            print(
                f"warning: {source.name}: source is smaller than its share, got {source.sampled_bytes / 1e6:.2f} of "
                f"{(source.quota_bytes or 0) / 1e6:.2f} MB, and is used whole. Pass --max-bytes {fitting_bytes} for "
                "the shares that you asked for, or add text.",
                file=sys.stderr,
            )


def print_summary(recipe: TokenizerRecipe, trained: TrainedTokenizer, elapsed_s: float) -> None:
    """Print the share of each source, and a last line with the pieces, the sample and the time."""
    if len(trained.sources) > 1:
        for source in trained.sources:
            print(
                f"{source.name}: weight {source.weight:g}, {source.sampled_bytes / 1e6:.2f} of "
                f"{source.text_bytes / 1e6:.2f} MB, {source.sampled_bytes / trained.sampled_bytes:.1%} of the sample"
            )
    if recipe.removes_extra_whitespaces:
        print("this preset removes surplus whitespace: decoding does not give it back")
    num_characters, num_symbols = len(recipe.required_chars), len(recipe.user_defined_symbols)
    requirements = f"{num_characters} required characters and {num_symbols} symbols, all present; "
    print(
        f"{trained.path}: {trained.vocab_size} pieces from {trained.num_sampled_lines} lines, "
        f"{trained.sampled_bytes / 1e6:.2f} of {trained.text_bytes / 1e6:.2f} MB in {trained.num_documents} documents; "
        f"{requirements if num_characters + num_symbols else ''}{elapsed_s:.1f} s"
    )
