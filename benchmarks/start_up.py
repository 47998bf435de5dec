#!/usr/bin/env python3
"""From the command to the first step: hammer-tiny on two CPU processes (TP=2), data and tokenizer prepared.

    python benchmarks/start_up.py --rounds 3

Each round runs the training command and notes when metrics.jsonl has its first line; that step's own time is taken
off. A further run of the same code, with a clock around its stages, says where the time goes (rank 0).
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from on_gpu.setting import write_data

ROOT = Path(__file__).resolve().parents[1]
STARTED_VARIABLE, STAGES_VARIABLE = "START_UP_STARTED_AT_S", "START_UP_STAGES_PATH"
POLL_S = 0.01
TARGET_S = 20.0


def build_flags(work_dir: Path) -> list[str]:
    return [
        *("--preset", "hammer-tiny", "--platform", "cpu", "--tensor-model-parallel-size", "2"),
        *("--data-path", str(work_dir / "data"), "--split", "100,0,0", "--tokenizer-type", "NullTokenizer"),
        *("--train-iters", "1", "--lr-warmup-iters", "0", "--eval-iters", "0"),
        *("--metrics-path", str(work_dir / "metrics.jsonl")),
    ]


def run(arguments: list[str], work_dir: Path, **variables: str) -> tuple[float, float]:
    """Run Python to its end; seconds until metrics.jsonl had a line, and until the end."""
    metrics_path = work_dir / "metrics.jsonl"
    metrics_path.unlink(missing_ok=True)
    started_at_s = time.time()
    variables |= {STARTED_VARIABLE: str(started_at_s), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (work_dir / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | variables | {"PYTHONPATH": search_path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        first_line_s = 0.0
        while process.poll() is None:
            if not first_line_s and metrics_path.exists() and metrics_path.stat().st_size:
                first_line_s = time.time() - started_at_s
            time.sleep(POLL_S)
        if process.returncode != 0 or not first_line_s:
            output.seek(0)
            sys.exit(f"{' '.join(arguments)} ended with {process.returncode}\n{output.read()}")
    return first_line_s, time.time() - started_at_s


def measure(work_dir: Path) -> dict[str, float]:
    launch = ["-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", "2", "--"]
    first_line_s, total_s = run([*launch, *build_flags(work_dir)], work_dir)
    first_step_s = json.loads((work_dir / "metrics.jsonl").read_text().splitlines()[0])["step_time_s"]
    return {"to_first_step_s": first_line_s - first_step_s, "first_step_s": first_step_s, "total_s": total_s}


# --- where the time goes --------------------------------------------------------------------------------------------


def measure_stages(work_dir: Path) -> dict[str, float]:
    """Seconds of each stage of rank 0, in order."""
    stages_path = work_dir / "stages.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--staged"]
    run([*launch, str(work_dir)], work_dir, **{STAGES_VARIABLE: str(stages_path)})
    marks = json.loads(stages_path.read_text())
    started_at_s, stages = float(marks["started"]), {}
    for name, at_s in marks["stages"]:
        stages[name] = at_s - started_at_s
        started_at_s = at_s
    return stages


def train_with_clock(work_dir: Path) -> None:
    """What training/pretrain.py's main does, noting the time after each stage."""
    stages: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        stages.append((name, time.time()))

    def mark_after(module: Any, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(module, function)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            mark(name)
            return result

        setattr(module, function, marked)

    mark("launcher and interpreter")
    import torch  # noqa: F401

    mark("import torch")
    from megatron_hammer.platforms import megatron_compat
    from megatron_hammer.training import pretrain

    argv = build_flags(work_dir)
    megatron_compat.install("cpu")  # imports megatron; a plain import first would leave torch.compile on
    mark("import megatron")
    arguments = pretrain.prepare(argv)
    mark("arguments")
    plan = pretrain.check(arguments)
    mark("preflight")
    from megatron.training import training

    mark_after(training, "initialize_megatron", "process group")
    mark_after(training, "setup_model_and_optimizer", "model and optimizer")
    mark_after(training, "build_train_valid_test_data_iterators", "data index")
    mark_after(training, "train_step", "first step")
    pretrain.train(arguments, plan, pretrain.open_terminal(plan))
    if os.environ["RANK"] == "0":
        marks = {"started": os.environ[STARTED_VARIABLE], "stages": stages}
        Path(os.environ[STAGES_VARIABLE]).write_text(json.dumps(marks))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of the command (%(default)s)")
    parser.add_argument("--json", action="store_true", help="every round and stage, as JSON")
    parser.add_argument("--staged", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.staged:
        train_with_clock(arguments.staged)
        return
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        write_data(work_dir / "data", num_tokens=500_000, vocab_size=4096)
        rounds = [measure(work_dir) for _ in range(arguments.rounds)]
        stages = measure_stages(work_dir)
    if arguments.json:
        print(json.dumps({"rounds": rounds, "stages": stages}, indent=2))
        return
    for name, elapsed_s in stages.items():
        print(f"{name:26s} {elapsed_s:6.2f} s")
    times_s = sorted(result["to_first_step_s"] for result in rounds)
    median_s = statistics.median(times_s)
    print(
        f"command to first step: {median_s:.1f} s (min {times_s[0]:.1f}, max {times_s[-1]:.1f} of {len(rounds)}), "
        f"{median_s / TARGET_S:.2f} of the {TARGET_S:.0f} s allowed"
    )


if __name__ == "__main__":
    main()
