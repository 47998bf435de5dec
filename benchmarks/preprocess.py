#!/usr/bin/env python3
"""Our preprocessor against Megatron-LM's on the same corpus with the same tokenizer, as a ratio of their throughputs.

    python benchmarks/preprocess.py --megatron-lm ../Megatron-LM --input corpus/*.jsonl --tokenizer-model a.model

The inputs are repeated to --megabytes of JSON lines, so that start-up does not count; the two tools take turns on that
file, and what they wrote must be the same bytes. Repeated text flatters whoever keeps a cache: pass more text, or
--shuffle-lines, which deals the lines of all documents out anew for every copy. Start-up is our command on a corpus of
one short document, from its start to its end. Memory is that of the whole process tree, shared pages counted once.
"""

import argparse
import filecmp
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.1
TARGET_RATIO, TARGET_STARTUP_S, TARGET_MEMORY_MIB = 8.0, 3.0, 1024.0
SEED = 1234


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of one tool, from the command to its end; cpu_s is that of all its processes."""

    elapsed_s: float
    cpu_s: float
    peak_memory_mib: float


# --- the corpus -----------------------------------------------------------------------------------------------------


def write_corpus(inputs: Sequence[Path], path: Path, num_bytes: int, *, shuffles_lines: bool) -> int:
    """Write at least `num_bytes` of JSON lines and return the bytes of text in them."""
    texts = [json.loads(line)["text"] for source in inputs for line in source.open(encoding="utf-8")]
    text_bytes = written_bytes = 0
    with path.open("wb") as file:
        for text in repeat_texts(texts, shuffles_lines=shuffles_lines):
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            text_bytes += len(text.encode())
            written_bytes += len(line)
            if written_bytes >= num_bytes:
                return text_bytes
    raise AssertionError("texts repeat without an end")


def repeat_texts(texts: Sequence[str], *, shuffles_lines: bool) -> Iterator[str]:
    """The documents over and over; with `shuffles_lines` as many documents as long, of lines from anywhere."""
    shuffle = random.Random(SEED).shuffle
    while True:
        if not shuffles_lines:
            yield from texts
            continue
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        shuffle(lines)
        remaining = iter(lines)
        for text in texts:
            yield "".join(itertools.islice(remaining, len(text.splitlines())))


# --- the two tools --------------------------------------------------------------------------------------------------


def build_our_command(corpus_path: Path, prefix: Path, arguments: argparse.Namespace) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus_path)),
        *("--tokenizer-model", str(arguments.tokenizer_model), "--output-prefix", str(prefix)),
        *("--workers", str(arguments.workers), "--append-eod"),
    ]


def build_their_command(corpus_path: Path, prefix: Path, arguments: argparse.Namespace) -> list[str]:
    return [
        *(sys.executable, str(arguments.megatron_lm / "tools" / "preprocess_data.py"), "--input", str(corpus_path)),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(arguments.tokenizer_model)),
        *("--output-prefix", str(prefix), "--workers", str(arguments.workers), "--append-eod"),
    ]


def run(command: list[str], log_path: Path) -> Run:
    """Run a command to its end, watching the memory of it and its descendants."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": search_path}
    started_at_s, cpu_before_s = time.perf_counter(), measure_ended_cpu_s()
    with log_path.open("w") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT)
        peak_bytes = 0
        while True:
            try:
                process.wait(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                peak_bytes = max(peak_bytes, measure_memory_bytes(process.pid))
    elapsed_s = time.perf_counter() - started_at_s
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}\n{log_path.read_text()[-4000:]}")
    cpu_s = measure_ended_cpu_s() - cpu_before_s
    return Run(elapsed_s=elapsed_s, cpu_s=cpu_s, peak_memory_mib=peak_bytes / 2**20)


def measure_ended_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_memory_bytes(pid: int) -> int:
    total_bytes = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            memory = process.memory_full_info()
            total_bytes += getattr(memory, "pss", memory.rss)
    except psutil.Error:  # one of them has just ended
        pass
    return total_bytes


# --- the comparison -------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Runs of both tools in turn; exits if what they wrote differs."""
    corpus_path = work_dir / "corpus.jsonl"
    num_bytes = round(arguments.megabytes * 1e6)
    text_bytes = write_corpus(arguments.input, corpus_path, num_bytes, shuffles_lines=arguments.shuffle_lines)
    startup_s = [measure_startup(arguments, work_dir) for _ in range(arguments.rounds)]
    ours, theirs = [], []
    for number in range(arguments.rounds):
        ours.append(run(build_our_command(corpus_path, work_dir / f"ours{number}", arguments), work_dir / "log.txt"))
        theirs.append(run(build_their_command(corpus_path, work_dir / "theirs", arguments), work_dir / "log.txt"))
        require_same_bytes(work_dir / f"ours{number}_text_document", work_dir / "theirs_text_document")
    return {
        "text_bytes": text_bytes,
        "ours": [asdict(result) for result in ours],
        "theirs": [asdict(result) for result in theirs],
        "ratios": [b.elapsed_s / a.elapsed_s for a, b in zip(ours, theirs, strict=True)],
        "cpu_ratios": [b.cpu_s / a.cpu_s for a, b in zip(ours, theirs, strict=True)],
        "startup_s": startup_s,
    }


def measure_startup(arguments: argparse.Namespace, work_dir: Path) -> float:
    corpus_path = work_dir / "one.jsonl"
    corpus_path.write_text('{"text": "one document"}\n')
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        return run(build_our_command(corpus_path, Path(folder) / "one", arguments), work_dir / "log.txt").elapsed_s


def require_same_bytes(our_prefix: Path, their_prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        our_path, their_path = Path(f"{our_prefix}{suffix}"), Path(f"{their_prefix}{suffix}")
        if not filecmp.cmp(our_path, their_path, shallow=False):
            sys.exit(f"{our_path} and {their_path} must be the same bytes, got different ones.")
        our_path.unlink()


def report(results: dict[str, Any]) -> None:
    text_bytes = results["text_bytes"]
    for name in ("ours", "theirs"):
        runs = results[name]
        rates = sorted(text_bytes / result["elapsed_s"] / 1e6 for result in runs)
        peak_mib = max(result["peak_memory_mib"] for result in runs)
        print(
            f"{name:7s} {statistics.median(rates):6.2f} MB/s of text (min {rates[0]:.2f}, max {rates[-1]:.2f} of "
            f"{len(rates)}), peak memory {peak_mib:.0f} MiB"
        )
    startup_s = sorted(results["startup_s"])
    print(
        f"ours, one document: {statistics.median(startup_s):.2f} s (min {startup_s[0]:.2f}, max {startup_s[-1]:.2f}) "
        f"of the {TARGET_STARTUP_S:.0f} s allowed; memory allowed {TARGET_MEMORY_MIB:.0f} MiB"
    )
    ratios, cpu_ratios = sorted(results["ratios"]), sorted(results["cpu_ratios"])
    print(
        f"same bytes; theirs / ours in time: {statistics.median(ratios):.1f} (min {ratios[0]:.1f}, max "
        f"{ratios[-1]:.1f}), target {TARGET_RATIO:.0f}; in CPU time: {statistics.median(cpu_ratios):.1f} "
        f"(min {cpu_ratios[0]:.1f}, max {cpu_ratios[-1]:.1f})"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", type=Path, required=True, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=".jsonl files with a field text")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="a SentencePiece .model")
    parser.add_argument("--megabytes", type=float, default=100.0, help="size of the corpus (%(default)s)")
    parser.add_argument("--shuffle-lines", action="store_true", help="repeat the text in ever other orders")
    parser.add_argument("--workers", type=int, default=2, help="of each tool (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool (%(default)s)")
    parser.add_argument("--work-dir", type=Path, help="where to write; a temporary folder if absent")
    parser.add_argument("--json", action="store_true", help="every round, as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        results = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    report(results)


if __name__ == "__main__":
    main()
