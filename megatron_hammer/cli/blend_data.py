"""Choose the weights of several data sets for training, and preview what a run reads from each.

Prints a --data-path line. With a budget it also prints the tokens and epochs of every source. A source is the prefix
of a .bin/.idx pair, or NAME=PREFIX. A budget is --train-tokens, or --train-iters with --global-batch-size.
epochs: how often a source is read; built: the whole epochs that Megatron shuffles and takes the samples from.
"""

import argparse
import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from megatron_hammer.data.blending import (
    DEFAULT_MAX_EPOCHS,
    BlendSource,
    Budget,
    SourcePreview,
    cap_weights,
    encode_data_args,
    find_warnings,
    is_blend_file,
    list_data_path,
    preview_blend,
    read_sources,
    round_weights,
    validate_weights,
    weigh_by_tokens,
)
from megatron_hammer.data.order.order import normalize_weights
from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.publish import publish_files, require_places
from megatron_hammer.files.tables import build_table, open_console, print_json

# Powers of ten, as papers count tokens: 20B is 20 x 10^9.
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """Read 20000000, 20_000_000, 20M, 1.5B or 3e11."""
    match = re.fullmatch(r"([\d._]+(?:[eE]\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        # round(), not int(): in floating point the product may be just below a whole number.
        count = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a positive count such as 20000000, 20M or 1.5B, got {text}")
    return count


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="[NAME=]PREFIX", help="pairs to blend, without .bin or .idx")
    parser.add_argument(
        "--split", help="shares of training, validation and test, as in training (default: all for training)"
    )
    # A temperature acts on the sizes, so it has no meaning beside given weights.
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--temperature", type=float, default=1.0, help="weights ~ tokens^(1/T); 1 means by size (%(default)s)"
    )
    ways.add_argument("--weights", nargs="+", type=float, help="one weight per source, in their order; any sum")
    budget = parser.add_argument_group("length of the run")
    budget.add_argument("--train-tokens", type=parse_count, help="such as 20B")
    # The names of training's own flags, so that a line can be copied from a run.
    budget.add_argument("--train-iters", type=parse_count, help="steps; needs --global-batch-size")
    budget.add_argument("--global-batch-size", type=parse_count, help="samples per step")
    budget.add_argument("--seq-length", type=parse_count, default=2048, help="tokens per sample (%(default)s)")
    budget.add_argument(
        "--max-epochs",
        type=float,
        default=DEFAULT_MAX_EPOCHS,
        help="warn if a source is read more often than this (%(default)g)",
    )
    budget.add_argument(
        "--cap-epochs", action="store_true", help="lower the weights of such sources and raise the others"
    )
    parser.add_argument("--output", type=parse_new_name, help="write the blend to this file, for --data-args-path")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    of_budget = dict.fromkeys(("seq_length", "max_epochs", "cap_epochs"), "train_tokens or train_iters")
    parser.refuse_idle(argv, of_budget | {"global_batch_size": "train_iters"})
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints a --data-path line; warnings go to stderr and do not change the exit code."""
    arguments = parse_arguments(argv)
    require_places((arguments.output, is_blend_file))
    budget = read_budget(arguments)
    sources = read_sources(arguments.sources, arguments.split)
    # Rounded before the preview: it must describe the weights as they are printed and written.
    weights = round_weights(choose_weights(arguments, sources, budget))
    previews = preview_blend(weights, sources, budget) if budget is not None else None
    data_path = list_data_path(weights, sources)
    # Only with a budget: without a length, no source is read too often.
    warnings = find_warnings(previews, sources, budget, arguments.max_epochs) if previews and budget else []
    if arguments.output is not None:
        publish_files({arguments.output: encode_data_args(weights, sources)})
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.json:
        result = {"sources": list_rows(sources, weights, previews), "data_path": data_path, "warnings": warnings}
        if budget is not None:
            result["budget"] = dataclasses.asdict(budget) | {"num_tokens": budget.num_tokens}
        print_json(result)
        return
    open_console().print(build_sources(sources, weights, previews))
    # With --split, because the tokens and epochs above are those of the training part of this split.
    print(f"--data-path {shlex.join(data_path)}" + (f" --split {arguments.split}" if arguments.split else ""))
    print(summarise(sources, budget, arguments))


def read_budget(arguments: argparse.Namespace) -> Budget | None:
    """The length of the run; None if none was given. Raises ConfigError if the flags contradict each other."""
    if not 0 < arguments.max_epochs < float("inf"):
        raise ConfigError(f"max-epochs: must be positive and finite, got {arguments.max_epochs}. Pass --max-epochs 4.")
    if arguments.train_tokens is not None and arguments.train_iters is not None:
        raise ConfigError("train-tokens: cannot be combined with --train-iters, got both. Drop one of them.")
    if arguments.train_iters is not None:
        if arguments.global_batch_size is None:
            raise ConfigError(
                "global-batch-size: must be given with --train-iters, got none. Pass the samples per step."
            )
        num_samples = arguments.train_iters * arguments.global_batch_size
        return Budget(num_samples=num_samples, seq_length=arguments.seq_length)
    if arguments.train_tokens is not None:
        # Rounded up: the run must draw at least the tokens that were asked for.
        num_samples = -(-arguments.train_tokens // arguments.seq_length)
        return Budget(num_samples=num_samples, seq_length=arguments.seq_length)
    return None


def choose_weights(arguments: argparse.Namespace, sources: Sequence[BlendSource], budget: Budget | None) -> np.ndarray:
    """The normalized weight of every source: as given or by size, then lowered by --cap-epochs."""
    num_tokens = [source.num_tokens for source in sources]
    if arguments.weights is not None:
        validate_weights(arguments.weights, len(sources))
        weights = normalize_weights(arguments.weights)
    else:
        weights = weigh_by_tokens(num_tokens, arguments.temperature)
    # Last, also on given weights: the cap is a limit on what is read, whatever the weights are.
    if arguments.cap_epochs and budget is not None:
        weights = cap_weights(weights, num_tokens, budget, arguments.max_epochs)
    return weights


def build_sources(
    sources: Sequence[BlendSource], weights: Sequence[str], previews: Sequence[SourcePreview] | None
) -> Table:
    """The table of the sources; with a budget, also what the run draws from each."""
    headings = ["source", "weight", "training tokens"]
    headings += ["drawn tokens", "epochs", "built"] if previews else ["of all tokens"]
    rows = []
    total_tokens = sum(source.num_tokens for source in sources)
    for source, weight, drawn in itertools.zip_longest(sources, weights, previews or ()):
        cells = [f"{float(weight):.4%}", f"{source.num_tokens:,}"]
        if drawn:
            cells += [f"{drawn.num_tokens:,}", f"{drawn.epochs:.3f}", f"{drawn.num_epochs_built:,}"]
        else:
            # Beside its weight, a source's share of the tokens shows by how much it is favoured.
            cells.append(f"{source.num_tokens / total_tokens:.4%}")
        rows.append((source.name, *cells))
    return build_table(None, headings, rows)


def list_rows(
    sources: Sequence[BlendSource], weights: Sequence[str], previews: Sequence[SourcePreview] | None
) -> list[dict[str, Any]]:
    """The sources for --json; drawn: only with a budget."""
    return [
        dataclasses.asdict(source) | {"weight": float(weight)} | ({"drawn": dataclasses.asdict(drawn)} if drawn else {})
        for source, weight, drawn in itertools.zip_longest(sources, weights, previews or ())
    ]


def summarise(sources: Sequence[BlendSource], budget: Budget | None, arguments: argparse.Namespace) -> str:
    """The last line: sources and tokens, and with a budget the samples and epochs of the run."""
    total_tokens = sum(source.num_tokens for source in sources)
    written = f"; wrote {arguments.output}" if arguments.output is not None else ""
    if budget is None:
        return f"{len(sources)} sources, {total_tokens:,} training tokens{written}"
    return (
        f"{len(sources)} sources, {total_tokens:,} training tokens; the run draws {budget.num_samples:,} samples of "
        f"{budget.seq_length:,}, {budget.num_tokens:,} tokens, {budget.num_tokens / total_tokens:.3f} epochs{written}"
    )
