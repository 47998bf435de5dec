#!/usr/bin/env python3
"""Export a torch_dist checkpoint as a Hugging Face model: weights, config, tokenizer and model card.

Reads any parallel layout on a CPU, without megatron, a process group or a reference model, and verifies every tensor
by reading it back before the folder gets its name.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_hammer.checkpoint.export import (
    DEFAULT_MAX_SHARD_BYTES,
    DTYPES,
    ExportOptions,
    ExportReport,
    export_to_hugging_face,
)
from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="directory that training saved into, or one iteration")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--iteration", type=int, help="which one to export (the latest)")
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        help="SentencePiece .model, tokenizer.json or its folder (the one the checkpoint was trained with)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer files")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding to keep (the checkpoint's vocab_size)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights (as stored)")
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        default=DEFAULT_MAX_SHARD_BYTES / 1e9,
        help="largest safetensors file in units of 10^9 bytes (%(default)g)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --save")
    return parser.parse_args()


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main() -> None:
    arguments = parse_arguments()
    options = ExportOptions(
        load_dir=arguments.load,
        save_dir=arguments.save,
        iteration=arguments.iteration,
        tokenizer_path=arguments.tokenizer_model,
        has_tokenizer=not arguments.no_tokenizer,
        vocab_size=arguments.vocab_size,
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        overwrite=arguments.overwrite,
    )
    signal.signal(signal.SIGTERM, _raise_interrupt)
    report = export_with_progress(options)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(summarise(report))


def _raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def export_with_progress(options: ExportOptions) -> ExportReport:
    """Run with a live line on the terminal's stderr; where stderr is a file, it stays silent."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{stage} tensors", total=total)
            bar.update(tasks[stage], completed=done)

        return export_to_hugging_face(options, show)


def summarise(report: ExportReport) -> str:
    tokenizer = f"tokenizer equal on {report.num_checked_texts:,} texts" if report.num_checked_texts else "no tokenizer"
    files = "1 file" if report.num_shards == 1 else f"{report.num_shards} files"
    return (
        f"{report.save_dir}: {report.hf_class} of iteration {report.iteration}, {report.num_parameters:,} parameters; "
        f"{report.num_megatron_tensors} tensors in, {report.num_hf_tensors} out, 0 dropped, all read back equal; "
        f"{report.dtype} in {files}, {tokenizer}; {report.elapsed_s:.1f} s"
    )


if __name__ == "__main__":
    main()
