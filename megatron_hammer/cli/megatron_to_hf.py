"""Export a Megatron checkpoint as a Hugging Face model: weights, config, tokenizer and model card.

Reads torch_dist of any parallel layout, and mp_rank_* files, on a CPU, without a process group or a reference model.
Every tensor is read back from the written file and must equal the checkpoint's bit for bit. Then Megatron's own model
and transformers compute the same text, as far as memory allows. The folder is renamed into place only after that.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, importing
from megatron_hammer.files.progress import show_stages

with importing():
    from megatron_hammer.checkpoint.convert.to_hugging_face import (
        DEFAULT_MAX_SHARD_BYTES,
        DTYPES,
        LARGEST_SHARD_GB,
        ExportOptions,
        ExportReport,
        export_to_hugging_face,
    )
    from megatron_hammer.checkpoint.verification.print_checks import print_checks
    from megatron_hammer.checkpoint.verification.verify_conversion import LEVELS
    from megatron_hammer.checkpoint_files.open_checkpoint import WEIGHTS
    from megatron_hammer.cli.tokenizer_export import add_chat_flags
    from megatron_hammer.post_training.templates.chat_export import find_chat_format


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--load", type=Path, required=True, help="directory that training saved into, or one iteration")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--iteration", type=int, help="iteration to export (default: the latest)")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="model",
        help="the weights that the model computes with, or the optimizer's fp32 master copies (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        help="SentencePiece .model, tokenizer.json or its folder (default: the one the checkpoint was trained with)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    add_chat_flags(parser, default="that of the conversations that the checkpoint was trained on, if any")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding to keep (default: the checkpoint's vocab_size)"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of the written weights (default: as stored)")
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        # Decimal gigabytes, as transformers counts "5GB" in max_shard_size.
        default=DEFAULT_MAX_SHARD_BYTES / 1e9,
        help="largest safetensors file in units of 10^9 bytes (%(default)g)",
    )
    parser.add_argument(
        "--verify",
        choices=LEVELS,
        default="auto",
        help="after the exact comparison of every tensor, compare the logits of Megatron and transformers, sampled "
        "layers, or nothing more; auto takes logits where both fit in memory, else layers (%(default)s)",
    )
    parser.add_argument(
        "--ignore-arguments",
        nargs="+",
        default=[],
        metavar="NAME",
        help="saved arguments that Megatron up to core 0.19 does not have and that do not change what the model "
        "computes, as those of a fork; without this they stop the export",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --save")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    if arguments.no_tokenizer and arguments.chat_template:
        parser.error("--chat-template needs the tokenizer, got --no-tokenizer too")
    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        parser.error(f"--vocab-size must be at least 1, got {arguments.vocab_size}")
    if not 0 < arguments.max_shard_gb < LARGEST_SHARD_GB:
        parser.error(f"--max-shard-gb must lie between 0 and {LARGEST_SHARD_GB:g}, got {arguments.max_shard_gb:g}")
    if arguments.bind_token and not arguments.chat_template:
        parser.error("--bind-token must come with --chat-template, got it alone")
    return arguments


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints the checks and a summary; notes go to stderr."""
    arguments = parse_arguments(argv)
    options = ExportOptions(
        load_dir=arguments.load,
        save_dir=arguments.save,
        iteration=arguments.iteration,
        weights=arguments.weights,
        tokenizer_path=arguments.tokenizer_model,
        has_tokenizer=not arguments.no_tokenizer,
        vocab_size=arguments.vocab_size,
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        verify=arguments.verify,
        ignored_arguments=tuple(arguments.ignore_arguments),
        overwrite=arguments.overwrite,
        find_chat=functools.partial(find_chat_format, source=arguments.chat_template, bindings=arguments.bind_token),
    )
    with show_stages() as show:
        report = export_to_hugging_face(options, show)
    for note in report.notes:
        # On stderr, so that --json leaves one JSON document on stdout.
        print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        # default=str is for the paths in the report.
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print_checks(report.checks)
        print(summarise(report))


def summarise(report: ExportReport) -> str:
    """The last line: what was exported, the tensors in and out, and what the tokenizer was compared on."""
    is_copied = any(row.check == "tokenizer in transformers" for row in report.checks)
    tokenizer = "tokenizer copied" if is_copied else "no tokenizer"
    if report.num_checked_texts:
        tokenizer = f"tokenizer equal on {report.num_checked_texts:,} texts"
    files = "1 file" if report.num_shards == 1 else f"{report.num_shards} files"
    master = ", the optimizer's master weights" if report.weights == "master" else ""
    return (
        f"{report.save_dir}: {report.hf_class} of iteration {report.iteration}{master}, "
        f"{report.num_parameters:,} parameters; "
        f"{report.num_megatron_tensors} tensors in, {report.num_hf_tensors} out, 0 dropped, all read back equal; "
        f"{report.dtype} in {files}, {tokenizer}; {report.elapsed_s:.1f} s"
    )
