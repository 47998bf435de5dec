"""Add rows for an extended tokenizer to a Hugging Face model; a new row is the mean of those of the old pieces.

hammer resize-embeddings --model hf/base --old-tokenizer old.model --new-tokenizer merged.model --save hf/new
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_hammer.checkpoint.surgery.resize_embeddings import ResizeOptions, ResizeReport, resize_embeddings
from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.files.command_line import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="folder of a Hugging Face model")
    parser.add_argument("--old-tokenizer", type=Path, required=True, help="tokenizer that the model was trained with")
    parser.add_argument(
        "--new-tokenizer", type=Path, required=True, help="extended tokenizer: the same ids and more after them"
    )
    parser.add_argument("--save", type=Path, required=True, help="folder to create; it must be absent or empty")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints one sentence of what was resized, or with --json an object."""
    arguments = parse_arguments(argv)
    options = ResizeOptions(
        model_dir=arguments.model,
        old_tokenizer_path=arguments.old_tokenizer,
        new_tokenizer_path=arguments.new_tokenizer,
        save_dir=arguments.save,
        has_tokenizer=not arguments.no_tokenizer,
    )
    # On stderr, so that stdout has the result only.
    with Console(stderr=True).status("reading the model") as status:
        report = resize_embeddings(options, lambda stage: status.update(stage))
    if arguments.json:
        # default=str is for the paths in the report.
        print(json.dumps(dataclasses.asdict(report), default=str, ensure_ascii=False, indent=2))
    else:
        print(summarise(report))


def summarise(report: ResizeReport) -> str:
    """The last line: rows before and after, where the new rows come from, and what was left out."""
    parts = [
        f"{', '.join(report.resized)} from {report.num_old_rows:,} to {report.num_new_rows:,} rows",
        f"{report.num_added_pieces:,} new pieces, {report.num_reused_padding_rows:,} of them in rows of padding, "
        f"{report.num_unspelled_pieces:,} from the mean of all old pieces",
        f"{report.num_kept_padding_rows:,} rows of padding kept",
        f"{report.num_copied_tensors:,} other tensors copied",
    ]
    if not report.has_tokenizer:
        parts.append("no tokenizer was written: --no-tokenizer")
    # Files that are not copied are named, so that nothing is missing without notice.
    if report.left_out:
        parts.append(f"left out: {', '.join(report.left_out)}")
    return f"{report.save_dir}: {'; '.join(parts)}; {report.elapsed_s:.1f} s"
