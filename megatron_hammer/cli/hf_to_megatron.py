"""Import a Hugging Face model as a torch_dist checkpoint that training loads at any parallel layout.

Reads safetensors or pytorch_model.bin on a CPU, without megatron, a process group or a GPU. Every tensor is read back
and compared before the checkpoint is renamed into place. Then Megatron and transformers compute the model, each in a
process of its own. Training starts from the checkpoint at step 0, with a new optimizer.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, importing
from megatron_hammer.files.progress import build_progress

with importing():
    from megatron_hammer.checkpoint.convert.from_hugging_face import (
        DTYPES,
        ImportOptions,
        ImportReport,
        import_from_hugging_face,
    )
    from megatron_hammer.checkpoint.verification.print_checks import print_checks
    from megatron_hammer.checkpoint.verification.verify_conversion import LEVELS


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--load", type=Path, required=True, help="Hugging Face folder: config.json and weights")
    parser.add_argument("--save", type=Path, required=True, help="folder to write, for training's --load")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of the written weights (default: as stored)")
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        help="SentencePiece .model, tokenizer.json or its folder (default: the one in --load)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="copy no tokenizer")
    parser.add_argument(
        "--verify",
        choices=LEVELS,
        default="auto",
        help="what Megatron and transformers both compute: the whole model (logits), sampled layers, nothing "
        "(tensors; each is compared in any case), or as much as fits in memory (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import in --save")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.no_tokenizer and arguments.tokenizer_model:
        parser.error("--no-tokenizer copies none, got --tokenizer-model too")
    return arguments


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the checks and a summary; notes go to stderr."""
    arguments = parse_arguments(argv)
    options = ImportOptions(
        hf_dir=arguments.load,
        save_dir=arguments.save,
        dtype=arguments.dtype,
        tokenizer_path=arguments.tokenizer_model,
        has_tokenizer=not arguments.no_tokenizer,
        verify=arguments.verify,
        overwrite=arguments.overwrite,
    )
    report = import_with_progress(options)
    for note in report.notes:
        # On stderr, so that --json leaves one JSON document on stdout.
        print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        # default=str is for the paths in the report.
        print(json.dumps(dataclasses.asdict(report), default=str, indent=2))
        return
    print_checks(report.checks)
    print(summarise(report))


def import_with_progress(options: ImportOptions) -> ImportReport:
    """Run with a live line on the terminal's stderr; where stderr is a file, it stays silent."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with build_progress(*columns) as bar:
        # The number of tensors is known only after the headers are read.
        task = bar.add_task("reading headers", total=None)

        def show(done: int, total: int) -> None:
            # After the last tensor, Megatron and transformers still compute the model, which the bar cannot measure.
            is_last = done == total
            bar.update(
                task, completed=done, total=total, description="verifying" if is_last else "writing and verifying"
            )

        return import_from_hugging_face(options, show)


def summarise(report: ImportReport) -> str:
    tokenizer = "no tokenizer" if report.tokenizer_dir is None else f"tokenizer in {report.tokenizer_dir}"
    return (
        f"{report.save_dir}: {report.model_type} with {report.num_parameters:,} parameters in {report.dtype}; "
        f"{report.num_hf_tensors} tensors in, {report.num_skipped} left out, {report.num_megatron_tensors} out, "
        f"all read back equal; {tokenizer}; {report.elapsed_s:.1f} s"
    )
