#!/usr/bin/env python3
"""Turn raw text into Megatron's .bin/.idx pair, with a manifest beside it.

Inputs: .jsonl .json .txt, each also as .gz or .zst, and .parquet; files, globs, directories.
Writes <output-prefix>_<key>_document.{bin,idx,manifest.json} for each of --json-keys.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import orjson
import rich.progress
from rich.console import Console

from megatron_hammer.data.manifest import Manifest
from megatron_hammer.data.preprocess import PreprocessOptions, Progress, preprocess
from megatron_hammer.errors import exit_on_user_error

INTERRUPTED_EXIT_CODE = 130


def count_cores() -> int:
    """Return the cores that this process may use, which a scheduler may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or directories")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="fields that hold text (text)")
    parser.add_argument(
        "--tokenizer-model", type=Path, required=True, help="SentencePiece .model, tokenizer.json, or its folder"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the outputs without _<key>_document")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument(
        "--workers", type=int, default=count_cores(), help="encoding processes (one a core: %(default)s)"
    )
    parser.add_argument("--max-errors", type=int, default=0, help="bad records to skip before stopping (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.max_errors < 0:
        parser.error(
            f"--workers must be at least 1 and --max-errors at least 0, "
            f"got workers={arguments.workers}, max_errors={arguments.max_errors}"
        )
    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        parser.error(f"--json-keys must be distinct, got {' '.join(arguments.json_keys)}")
    return arguments


@exit_on_user_error
def main() -> None:
    arguments = parse_arguments()
    options = PreprocessOptions(
        inputs=tuple(arguments.input),
        tokenizer_path=arguments.tokenizer_model,
        output_prefix=arguments.output_prefix,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        num_workers=arguments.workers,
        max_errors=arguments.max_errors,
    )
    started_at_s = time.monotonic()
    manifests = preprocess_with_progress(options)
    elapsed_s = time.monotonic() - started_at_s
    for problem in next(iter(manifests.values())).problems:
        print(f"dropped: {problem}", file=sys.stderr)
    if arguments.json:
        outputs = {str(prefix): manifest.to_json() for prefix, manifest in manifests.items()}
        print(orjson.dumps({"outputs": outputs, "elapsed_s": elapsed_s}, option=orjson.OPT_INDENT_2).decode())
        return
    for prefix, manifest in manifests.items():
        print(summarise(prefix, manifest, elapsed_s))


def preprocess_with_progress(options: PreprocessOptions) -> dict[Path, Manifest]:
    """Run with a live line on the terminal's stderr; where stderr is a file, it stays silent."""
    console = Console(stderr=True)
    bar = rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TextColumn("{task.fields[counts]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, counts="")

        def show(progress: Progress) -> None:
            counts = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens"
            bar.update(task, completed=progress.read_bytes, total=progress.total_bytes, counts=counts)

        return preprocess(options, show)


def summarise(prefix: Path, manifest: Manifest, elapsed_s: float) -> str:
    num_in = manifest.num_documents + manifest.num_dropped_documents
    ignored = f", {len(manifest.ignored_files)} files of other types ignored" if manifest.ignored_files else ""
    return (
        f"{prefix}: {num_in:,} documents in, {manifest.num_documents:,} out, "
        f"{manifest.num_dropped_documents:,} dropped, {manifest.num_empty_documents:,} empty{ignored}; "
        f"{manifest.num_tokens:,} tokens as {manifest.dtype}, "
        f"{manifest.bytes_per_token:.2f} bytes a token; {elapsed_s:.1f} s, "
        f"{manifest.text_bytes / elapsed_s / 1e6:.1f} MB/s"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("error: interrupted; incomplete files were removed. Run the same command again.", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
