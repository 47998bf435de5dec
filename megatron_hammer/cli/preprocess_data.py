"""Turn raw text into Megatron's .bin/.idx pair, with a manifest beside it.

Inputs: .jsonl .json .txt, each also as .gz or .zst, and .parquet; files, globs, directories.
Writes <output-prefix>_<key>_document.{bin,idx,manifest.json} for each of --json-keys.
After a stop, run the same command again: it continues where it stopped.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.progress import TextColumn

from megatron_hammer.data.indexed.manifest import Manifest
from megatron_hammer.data.preprocess import megatron_lm_flags
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.preprocess import PreprocessProgress, explain_resume, preprocess
from megatron_hammer.data.preprocess.run import MAX_PROBLEMS_SHOWN
from megatron_hammer.data.preprocess.sharding import parse_shard
from megatron_hammer.data.preprocess.worker_pool import count_cores
from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.progress import build_byte_progress
from megatron_hammer.files.tables import print_json

SIGNAL_EXIT_CODE = 128  # plus the number of the signal, as shells report it


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help. Exits with 2 if values contradict each other or are out of range."""
    parser = CommandParser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or directories")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="fields that hold text (text)")
    parser.add_argument(
        "--tokenizer-model", type=Path, required=True, help="SentencePiece .model, tokenizer.json, or its folder"
    )
    parser.add_argument(
        "--output-prefix", type=parse_new_name, required=True, help="path of the outputs without _<key>_document"
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument(
        "--prepend-bos", action="store_true", help="begin every document with the beginning-of-sequence token"
    )
    parser.add_argument(
        "--split-sentences", action="store_true", help="one sequence per sentence, split by nltk's Punkt"
    )
    parser.add_argument("--lang", default="english", help="language of the sentences (%(default)s)")
    parser.add_argument("--keep-newlines", action="store_true", help="keep the white space between sentences")
    parser.add_argument(
        "--workers", type=int, default=count_cores(), help="encoding processes (one per core: %(default)s)"
    )
    parser.add_argument("--max-errors", type=int, default=0, help="bad records to skip before stopping (%(default)s)")
    parser.add_argument("--shuffle", action="store_true", help="put the documents into random order")
    parser.add_argument("--seed", type=int, default=1234, help="random seed of --shuffle (%(default)s)")
    parser.add_argument("--shard", metavar="I/N", help="process part I (from 0) of N; merge-data joins the parts")
    parser.add_argument("--restart", action="store_true", help="discard an unfinished or complete run and begin again")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    megatron_lm_flags.add_flags(parser)
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, {"seed": "shuffle", "lang": "split_sentences", "keep_newlines": "split_sentences"})
    if arguments.shuffle and arguments.keep_sequential_samples:
        parser.error("--keep-sequential-samples keeps the order of documents, got --shuffle too")
    if arguments.workers < 1 or arguments.max_errors < 0:
        parser.error(
            f"--workers must be at least 1 and --max-errors at least 0, "
            f"got workers={arguments.workers}, max_errors={arguments.max_errors}"
        )
    # The same key twice would write into the same files.
    if len(set(arguments.json_keys)) < len(arguments.json_keys):
        parser.error(f"--json-keys must be distinct, got {' '.join(arguments.json_keys)}")
    return arguments


def build_options(arguments: argparse.Namespace) -> PreprocessOptions:
    """The flags as options; raises ConfigError for a --shard that is not I/N, and flags that cannot be taken."""
    megatron_lm_flags.refuse_what_cannot_be_taken(arguments)
    return PreprocessOptions(
        inputs=tuple(arguments.input),
        tokenizer_path=arguments.tokenizer_model,
        tokenizer_type=arguments.tokenizer_type,
        includes_template=arguments.includes_template,
        output_prefix=arguments.output_prefix,
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        prepend_bos=arguments.prepend_bos,
        split_sentences=arguments.split_sentences,
        language=arguments.lang,
        keep_newlines=arguments.keep_newlines,
        # --seed has a default, so it alone does not ask for a shuffle.
        seed=arguments.seed if arguments.shuffle else None,
        shard=None if arguments.shard is None else parse_shard(arguments.shard),
        num_workers=arguments.workers,
        max_errors=arguments.max_errors,
        restart=arguments.restart,
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. A stop by a signal exits with 128 and the signal's number."""
    # Before the signal handlers: a wrong flag has nothing to keep.
    options = build_options(arguments := parse_arguments(argv))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    started_at_s = time.monotonic()
    try:
        with LiveLine(arguments.log_interval) as line:
            result = preprocess(options, line.show, print_note)
    except KeyboardInterrupt:
        exit_interrupted(options)
    elapsed_s = time.monotonic() - started_at_s
    # A bad record is dropped for all keys, so every manifest lists the same problems.
    print_dropped(next(iter(result.manifests.values())).problems)
    if arguments.json:
        outputs = {str(prefix): manifest.to_json() for prefix, manifest in result.manifests.items()}
        print_json({"outputs": outputs, "was_complete": result.was_complete, "elapsed_s": elapsed_s})
        return
    for prefix, manifest in result.manifests.items():
        effort = f"{elapsed_s:.1f} s, {manifest.text_bytes / elapsed_s / 1e6:.1f} MB/s"
        if result.was_complete:
            effort = "already complete, nothing was written"
        # No rate: the time does not cover what the earlier run did.
        elif result.was_continued:
            effort = f"{elapsed_s:.1f} s since it was continued"
        print(f"{summarise(prefix, manifest)}; {effort}")


class LiveLine:
    """A live line with rate and time left on the terminal's stderr; where stderr is a file, it stays silent.

    log_interval: documents after each of which a line stays on stderr, a file too; None prints none.
    """

    def __init__(self, log_interval: int | None = None) -> None:
        self._log_interval = log_interval
        self._num_logged = 0
        self._bar = build_byte_progress(TextColumn("{task.fields[counts]}"), has_description=True)
        self._task = self._bar.add_task("", total=None, counts="")
        self._description = ""

    def __enter__(self) -> "LiveLine":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, progress: PreprocessProgress) -> None:
        description = "shuffling" if progress.is_shuffling else "encoding"
        if description != self._description:  # what an earlier run has done must not count as speed
            self._bar.reset(self._task, description=description, completed=progress.done_bytes)
            self._description = description
        counts = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens"
        if self._log_interval and progress.num_documents - self._num_logged >= self._log_interval:
            self._num_logged = progress.num_documents - progress.num_documents % self._log_interval
            done = f"{progress.done_bytes / 1e6:,.1f} of {progress.total_bytes / 1e6:,.1f} MB read"
            print(f"{counts}; {done}", file=sys.stderr)
        self._bar.update(self._task, completed=progress.done_bytes, total=progress.total_bytes, counts=counts)


def print_note(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def print_dropped(problems: Sequence[str]) -> None:
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        print(f"dropped: {problem}", file=sys.stderr)
    if len(problems) > MAX_PROBLEMS_SHOWN:
        print(f"dropped: {len(problems) - MAX_PROBLEMS_SHOWN:,} more, listed in the manifest", file=sys.stderr)


def exit_interrupted(options: PreprocessOptions) -> NoReturn:
    """Say what remains; the exit code is that of the signal, as shells have it."""
    # A run without a journal has removed what it wrote.
    rest = "nothing was done yet. Run the same command again."
    if options.journal_path.exists():
        rest = explain_resume(options)
    print(f"error: interrupted; {rest}", file=sys.stderr)
    sys.exit(SIGNAL_EXIT_CODE + (received_signal or signal.SIGINT))


received_signal: int | None = None


def interrupt(number: int, frame: Any) -> NoReturn:
    """Let SIGTERM, which schedulers send, end a run like Ctrl-C."""
    # exit_interrupted needs the number, and KeyboardInterrupt does not carry it.
    global received_signal
    received_signal = number
    raise KeyboardInterrupt


def summarise(prefix: Path, manifest: Manifest) -> str:
    num_in = manifest.num_documents + manifest.num_dropped_documents
    ignored = f", {len(manifest.ignored_files)} files of other types ignored" if manifest.ignored_files else ""
    return (
        f"{prefix}: {num_in:,} documents in, {manifest.num_documents:,} out, "
        f"{manifest.num_dropped_documents:,} dropped, {manifest.num_empty_documents:,} empty{ignored}; "
        f"{manifest.num_tokens:,} tokens as {manifest.dtype}, {manifest.bytes_per_token:.2f} bytes per token"
    )
