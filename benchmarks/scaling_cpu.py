#!/usr/bin/env python3
"""A projection calibrated on one and two CPU processes against the measured step of four.

    python benchmarks/scaling_cpu.py --work-dir outputs/scaling-cpu

End to end with the commands that a user has: `profile` times this machine's operators, `measure` trains hammer-tiny
for a few steps on one and two processes, `calibrate` fits, and the steps of four processes, which share the cores of
this machine, are measured last. Finished runs are kept, so a stopped command continues where it was; --repeats 3 raises
the number of runs whose medians are taken.

Exit code 1 where a prediction is off by more than --tolerance (default 0.2). Times mean something on an idle machine
only; --statistic fastest takes each run's shortest step, for one that is not.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION_LAYOUTS = "single,tp2,pp2,dp2"
FOUR_PROCESS_LAYOUTS = "tp2-pp2,dp4,tp2-dp2,pp2-dp2,pp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One measured layout beside what was predicted of it."""

    layout: str
    num_processes: int
    global_batch_size: int
    predicted_s: float
    measured_s: float

    @property
    def error_ratio(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


def study(*words: str) -> None:
    """Run one command of tools/scaling_study.py; its output goes to stderr, and its failure ends this one."""
    command = [sys.executable, str(ROOT / "tools" / "scaling_study.py"), *words]
    print(f"== {' '.join(words)}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)


def measure(arguments: argparse.Namespace, layouts: str, output_dir: Path) -> None:
    study(
        *("measure", "--presets", arguments.preset, "--layouts", layouts, "--output-dir", str(output_dir)),
        *("--global-batch-sizes", arguments.global_batch_sizes, "--steps", str(arguments.steps)),
        *("--repeats", str(arguments.repeats), "--statistic", arguments.statistic, "--platform", "cpu"),
    )


def compare(work_dir: Path, runs_path: Path) -> list[Comparison]:
    """Predictions of the calibrated coefficients for every row of runs.csv."""
    hardware = {
        "gpus_path": work_dir / "profile" / "gpus.toml",
        "clusters_path": work_dir / "profile" / "clusters.toml",
    }
    coefficients = load_coefficients(work_dir / "coefficients.toml")
    runs, unpredictable = read_runs(runs_path, **hardware)
    if unpredictable:
        raise ValueError(f"{runs_path}: rows that cannot be predicted: {unpredictable}")
    return [
        Comparison(
            layout=name_layout(run),
            num_processes=run.plan.layout.world_size,
            global_batch_size=run.plan.global_batch_size,
            predicted_s=float(predict_step(run.plan, coefficients).total_s),
            measured_s=run.step_time_s,
        )
        for run in runs
    ]


def name_layout(run: MeasuredRun) -> str:
    layout = run.plan.layout
    sizes = {
        "tp": layout.tensor_model_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "dp": layout.data_parallel_size,
    }
    return "-".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "single"


def print_table(title: str, comparisons: list[Comparison]) -> None:
    print(title)
    for one in comparisons:
        print(
            f"  {one.layout:8} global batch {one.global_batch_size:3}: predicted {one.predicted_s:.3f} s, "
            f"measured {one.measured_s:.3f} s, error {one.error_ratio:+.1%}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="profile, runs and coefficients")
    parser.add_argument("--preset", default="hammer-tiny")
    parser.add_argument("--global-batch-sizes", default="8,16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--statistic", choices=["median", "fastest"], default="median")
    parser.add_argument("--tolerance", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    work_dir = arguments.work_dir
    profile_dir, small_dir, four_dir = work_dir / "profile", work_dir / "calibration", work_dir / "four"
    hardware = ("--gpus-file", str(profile_dir / "gpus.toml"), "--clusters-file", str(profile_dir / "clusters.toml"))
    if not (profile_dir / "coefficients.toml").exists():
        study("profile", "--platform", "cpu", "--output-dir", str(profile_dir), "--statistic", arguments.statistic)
    measure(arguments, CALIBRATION_LAYOUTS, small_dir)
    study(
        *("calibrate", "--runs", str(small_dir / "runs.csv"), "--start", str(profile_dir / "coefficients.toml")),
        *("--output", str(work_dir / "coefficients.toml"), *hardware),
    )
    measure(arguments, FOUR_PROCESS_LAYOUTS, four_dir)
    fitted = compare(work_dir, small_dir / "runs.csv")
    predicted = compare(work_dir, four_dir / "runs.csv")
    largest = max(abs(one.error_ratio) for one in predicted)
    if arguments.json:
        tables = {"fitted": fitted, "predicted": predicted}
        rows = {name: [asdict(one) | {"error_ratio": one.error_ratio} for one in ones] for name, ones in tables.items()}
        print(json.dumps(rows, indent=2))
    else:
        print_table("one and two processes, which the coefficients were fitted on:", fitted)
        print_table("four processes, predicted:", predicted)
    print(
        f"{len(predicted)} four-process steps, largest error {largest:.1%} of {arguments.tolerance:.0%} allowed",
        file=sys.stderr,
    )
    sys.exit(int(largest > arguments.tolerance))


if __name__ == "__main__":
    main()
