"""What checkpoints cost training: how long it waits for each, and how long its steps take while one is written.

    python benchmarks/async_save.py [--preset hammer-tiny] [--rounds 3] [--steps 60] [--interval 10] [--processes 2]

Each round trains the same run three times on CPUs: without saving, waiting for each checkpoint (--no-async-save), and
with a thread that writes it. The last column is what a save every 1,000 steps, the interval of the recipes, would cost.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODES = {"no saves": None, "waiting": ("--no-async-save",), "in a thread": ()}
RECIPE_INTERVAL_STEPS = 1000
NUM_FIRST_STEPS = 5  # they are slower


def train(options: argparse.Namespace, flags: tuple[str, ...] | None, folder: Path) -> tuple[float, float]:
    """Seconds of a step, and seconds that training waited for a save; medians of one run."""
    metrics_path = folder / "metrics.jsonl"
    launch = ["-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", str(options.processes), "--"]
    run = ["--preset", options.preset, "--mock-data", "--train-iters", str(options.steps), "--eval-iters", "0"]
    run += ["--metrics-path", str(metrics_path)]
    if flags is not None:
        run += ["--save", str(folder / "run"), "--save-interval", str(options.interval), *flags]
    subprocess.run([sys.executable, *launch, *run], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    steps_s = [line["step_time_s"] for line in lines if "step_time_s" in line][NUM_FIRST_STEPS:]
    waits_s = [line["save_time_s"] for line in lines if "save_time_s" in line]
    # A mean, not a median: a step during which a checkpoint is written counts.
    return statistics.fmean(steps_s), statistics.median(waits_s or [0.0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="hammer-tiny")
    for name, default in (("rounds", 3), ("steps", 60), ("interval", 10), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    rounds = [(mode, flags) for _ in range(options.rounds) for mode, flags in MODES.items()]
    for number, (mode, flags) in enumerate(rounds, 1):
        print(f"run {number} of {len(rounds)}: {mode}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            measured[mode].append(train(options, flags, Path(folder)))
    results = [summarise(mode, measured, options.interval) for mode in MODES]
    if options.json:
        print(json.dumps(results))
        return
    print("| mode | step, relative | wait per save, in steps | share of training at 1,000 steps per save |")
    print("|---|---|---|---|")
    for row in results:
        print(f"| {row['mode']} | {row['step']:.3f} | {row['wait_steps']:.2f} | {row['share']:.3%} |")


def summarise(mode: str, measured: dict[str, list[tuple[float, float]]], interval: int) -> dict[str, str | float]:
    """Ratios of one mode to the runs without saves."""
    plain_s = statistics.median(step_s for step_s, _ in measured["no saves"])
    step_s, wait_s = (statistics.median(column) for column in zip(*measured[mode], strict=True))
    # What steps lose while a checkpoint is written is counted at the interval measured here.
    lost_s = wait_s + max(0.0, step_s - plain_s) * interval if MODES[mode] is not None else 0.0
    share = lost_s / (RECIPE_INTERVAL_STEPS * plain_s)
    return {"mode": mode, "step": step_s / plain_s, "wait_steps": wait_s / plain_s, "share": share}


if __name__ == "__main__":
    main()
