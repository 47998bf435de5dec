"""Show what a checkpoint holds, or compare two: Megatron's (torch_dist, legacy) at any layout, or Hugging Face folders.

Lists tensors, the layout it was saved with, iteration, tokens, recipe and the exact number of parameters; with
--statistics also the range of every weight and its NaN. Exit code of --compare: 0 equal, 1 different, 2 not compared.
Different saved arguments are listed, but do not change the exit code. No code stored in a checkpoint is run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from megatron_hammer.checkpoint.inspection.comparison import compare_checkpoints
from megatron_hammer.checkpoint.inspection.inspect_checkpoint import describe_checkpoint, measure_tensors, select_views
from megatron_hammer.checkpoint.inspection.tables import (
    comparison_to_json,
    description_to_json,
    print_comparison,
    print_description,
    print_statistics,
    statistics_to_json,
    summarise_comparison,
    summarise_description,
    summarise_statistics,
)
from megatron_hammer.checkpoint.inspection.tensor_views import OpenedCheckpoint, is_hugging_face, open_any
from megatron_hammer.checkpoint.verification.print_checks import print_checks
from megatron_hammer.checkpoint.verification.verify_conversion import LEVELS, CheckRow, verify_model
from megatron_hammer.checkpoint_files.intact import find_hidden_damage, find_visible_damage, has_hashes
from megatron_hammer.errors import CheckpointError, ConfigError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import build_progress
from megatron_hammer.files.tables import open_console

# As in diff(1): 1 means different, 2 means that the comparison itself failed.
DIFFERENT_EXIT_CODE = 1
NUM_READERS = 8  # threads that hash files


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("path", type=Path, help="directory that training saved into, one iteration, or a model folder")
    parser.add_argument("--iteration", type=int, help="iteration of the first directory (default: the latest)")
    parser.add_argument(
        "--weights",
        choices=("model", "master"),
        default="model",
        help="of Megatron's checkpoints: the model's, or the optimizer's fp32 copies (%(default)s)",
    )
    parser.add_argument("--statistics", action="store_true", help="read every weight: range, mean, spread, NaN")
    parser.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="statistics of these tensors only, also of the optimizer: shell wildcards such as '*linear_qkv*'",
    )
    parser.add_argument(
        "--files",
        action="store_true",
        help="read every file of a Megatron checkpoint and compare it with the hash that was saved with it, or with "
        "torch's checksums where there are none",
    )
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="compare with this checkpoint")
    parser.add_argument("--other-iteration", type=int, help="iteration of OTHER (default: the latest)")
    parser.add_argument("--optimizer", action="store_true", help="compare the optimizer's state too")
    parser.add_argument(
        "--ignore-dtype",
        action="store_true",
        help="compare values in the narrower of two dtypes (default: different dtypes are a difference)",
    )
    parser.add_argument(
        "--forward",
        choices=[level for level in LEVELS if level != "tensors"],
        help="also compare what Megatron and transformers compute: the whole model (logits), sampled layers, or "
        "what fits in memory (auto)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


@exit_on_interrupt("nothing was changed")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Exits with 1 if --compare finds a difference."""
    arguments = parse_arguments(argv)
    validate_arguments(arguments)
    if arguments.compare is not None:
        compare(arguments)
    else:
        inspect(arguments)


def validate_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError naming every flag that would have no effect."""
    # A flag without effect would let the user believe that something was compared or measured.
    needed = {
        "--compare": {
            "--other-iteration": arguments.other_iteration is not None,
            "--optimizer": arguments.optimizer,
            "--ignore-dtype": arguments.ignore_dtype,
            "--forward": arguments.forward is not None,
        },
        "--statistics": {"--names": bool(arguments.names)},
    }
    # --statistics and --compare are the two flags that others depend on.
    has = {"--compare": arguments.compare is not None, "--statistics": arguments.statistics}
    problems = [
        f"{flag}: works with {other} only, got no {other}. Add it, or leave {flag} out."
        for other, flags in needed.items()
        for flag, is_given in flags.items()
        if is_given and not has[other]
    ]
    for flag in ("--statistics", "--files"):
        if arguments.compare is not None and getattr(arguments, flag.removeprefix("--")):
            problems.append(f"{flag}: is about one checkpoint, got --compare too. Run the two one after the other.")
    if problems:
        raise ConfigError(*problems)


def inspect(arguments: argparse.Namespace) -> None:
    """Print what one checkpoint holds; with --statistics, read every weight that is asked for."""
    opened = open_any(arguments.path, iteration=arguments.iteration, weights=arguments.weights)
    found = describe_checkpoint(opened)
    # Every weight is read for statistics; without the flag, only headers are.
    measured = {}
    if arguments.statistics:
        with show_progress("reading tensors") as on_tensor:
            measured = measure_tensors(select_views(opened, tuple(arguments.names)), on_tensor)
    verdict = verify_files(opened) if arguments.files else None
    if arguments.json:
        statistics = {"statistics": statistics_to_json(measured)} if measured else {}
        files = {} if verdict is None else {"files": verdict}
        print(json.dumps(description_to_json(found) | statistics | files))
        return
    console = open_console()
    print_description(found, console)
    if measured:
        print_statistics(measured, console)
        print(summarise_statistics(measured))
    if verdict is not None:
        print(f"files: {verdict}")
    print(summarise_description(found))


def verify_files(opened: OpenedCheckpoint) -> str:
    """How every file was verified. Raises CheckpointError naming those that are not as they were saved."""
    if not opened.is_megatron:
        raise ConfigError(f"--files: works with Megatron's checkpoints, got {opened.format}. Leave it out.")
    problems = find_visible_damage(opened.directory) or find_hidden_damage(opened.directory, num_threads=NUM_READERS)
    if problems:
        raise CheckpointError(*problems)
    has_all = opened.store is not None and has_hashes(opened.directory)
    return "all as saved, by their hashes" if has_all else "all as saved, by the checksums of their tensors"


def compare(arguments: argparse.Namespace) -> None:
    """Print how two checkpoints differ; exits with 1 if they do, or if a check of --forward fails."""
    paths = (arguments.path, arguments.compare)
    # Beside a Megatron checkpoint, a Hugging Face folder is compared with the weights that --weights chooses there.
    has_checkpoint = not all(map(is_hugging_face, paths))
    first, second = (
        open_any(
            path,
            iteration=iteration,
            weights="model" if has_checkpoint and is_hugging_face(path) else arguments.weights,
        )
        for path, iteration in zip(paths, (arguments.iteration, arguments.other_iteration), strict=True)
    )
    # Each library computes its own format, so a forward check needs one of each.
    if arguments.forward is not None and first.is_megatron == second.is_megatron:
        raise ConfigError(
            "--forward: one checkpoint must be Megatron's and the other a Hugging Face folder, got "
            f"{first.format} and {second.format}. Leave --forward out."
        )
    with show_progress("comparing tensors") as on_tensor:
        found = compare_checkpoints(
            first,
            second,
            ignores_dtype=arguments.ignore_dtype,
            has_optimizer=arguments.optimizer,
            on_tensor=on_tensor,
        )
    rows = [] if arguments.forward is None else run_forward(first, second, arguments)
    if arguments.json:
        forward = {"forward": [dataclasses.asdict(row) for row in rows]} if rows else {}
        print(json.dumps(comparison_to_json(found) | forward))
    else:
        print_comparison(found, open_console())
        if rows:
            print_checks(rows, title="Megatron against transformers")
        print(summarise_comparison(found))
    # "is False": None means that the check was not made.
    if not found.is_equal or any(row.is_passed is False for row in rows):
        sys.exit(DIFFERENT_EXIT_CODE)


def run_forward(first: OpenedCheckpoint, second: OpenedCheckpoint, arguments: argparse.Namespace) -> list[CheckRow]:
    """What Megatron and transformers compute, each in a process of its own."""
    # The two paths may be given in either order.
    megatron, folder = (first, second) if first.is_megatron else (second, first)
    return verify_model(megatron.directory, folder.directory, level=arguments.forward, weights=arguments.weights)


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A live line on the terminal's stderr; where stderr is a file, it stays silent."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with build_progress(*columns) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
