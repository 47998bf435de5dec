"""Run the settings of a sweep, one after the other, as short real trainings on this machine.

Each setting has its own folder, whose name ends with a digest of everything that the run depends on. A finished run is
recognised and kept, and a changed setting is a new run. run.json is written last, and says whether the run is complete
or why it failed. Runs over several machines are not supported here; `emit` writes launch scripts for them.
"""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.files.typed import read_json
from megatron_hammer.scaling.measured.sweep import Setting, digest_of
from megatron_hammer.scaling.measured.sweep_results import MeasuredSetting, StepTimes, read_step_times

LAUNCH_MODULE = "megatron_hammer.training.launch"
RECORD_NAME, METRICS_NAME, OUTPUT_NAME = "run.json", "metrics.jsonl", "output.txt"
STOP_GRACE_S = 60.0  # a run that is told to stop finishes its step first
NUM_REASON_LINES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the runs of a sweep have in common."""

    platform: str  # cpu or cuda
    gpu_type: str  # as runs.csv names it: cpu-core, or the device's name
    num_threads: int  # OpenMP threads of a process
    timeout_s: float  # of one run


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one repeat of one setting."""

    setting: Setting
    repeat: int
    times: StepTimes | None  # None: it failed
    reason: str | None  # why it failed
    is_new: bool  # False: it was finished before


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The fields of run.json that are read back."""

    status: Literal["complete", "failed"]
    reason: str | None = None  # why it failed


def describe_run(setting: Setting, machine: Machine, repeat: int) -> dict[str, Any]:
    """Everything that the time of a run depends on, as plain types. The digest in the folder's name is made of it."""
    return {
        "flags": setting.list_flags(),
        "num_processes": setting.layout.world_size,
        "platform": machine.platform,
        "gpu_type": machine.gpu_type,
        "num_threads": machine.num_threads,
        "repeat": repeat,
        "versions": {name: read_version(name) for name in ("torch", "megatron-core", "transformer-engine")},
    }


def read_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def select_run_dir(output_dir: Path, setting: Setting, machine: Machine, repeat: int) -> Path:
    return output_dir / "runs" / f"{setting.name}-{digest_of(describe_run(setting, machine, repeat))}"


def run_sweep(
    settings: Sequence[Setting],
    machine: Machine,
    output_dir: Path,
    *,
    num_repeats: int,
    num_warmup_steps: int,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Run what is not finished yet. A failed run is recorded, and the sweep continues.

    Repeats are the outer loop, so a disturbance does not affect all repeats of one setting. say: called with a line of
    progress for each run.
    """
    jobs = [(setting, repeat) for repeat in range(1, num_repeats + 1) for setting in settings]
    outcomes = []
    for number, (setting, repeat) in enumerate(jobs, 1):
        run_dir = select_run_dir(output_dir, setting, machine, repeat)
        record = read_record(run_dir)
        is_new = record is None or record.status == "failed" or not _has_metrics(run_dir, setting)
        if record is None or is_new:
            record = _run_setting(setting, machine, run_dir, repeat)
        outcome = _judge(record, run_dir, setting, repeat, num_warmup_steps, is_new=is_new)
        outcomes.append(outcome)
        say(f"{number}/{len(jobs)} {describe_outcome(outcome)}")
    return outcomes


def describe_processes(setting: Setting) -> str:
    return "1 process" if setting.layout.world_size == 1 else f"{setting.layout.world_size} processes"


def describe_outcome(outcome: Outcome) -> str:
    """One line of progress: the step time with its spread, or why the run failed."""
    setting = outcome.setting
    processes = describe_processes(setting)
    if outcome.times is None:
        return f"{setting.name}: {processes}, failed: {outcome.reason}"
    kept = "" if outcome.is_new else " (finished before)"
    times = outcome.times
    return (
        f"{setting.name}: {processes}, {times.median_s:.4g} s per step (median of "
        f"{times.num_steps - times.num_warmup_steps}, 80 % within {times.low_s:.4g} to {times.high_s:.4g}){kept}"
    )


def collect_measured(outcomes: Sequence[Outcome]) -> list[MeasuredSetting]:
    """The repeats of each setting that did not fail, in the order of the settings."""
    repeats: dict[Setting, list[StepTimes]] = {}
    for outcome in outcomes:
        if outcome.times is not None:
            repeats.setdefault(outcome.setting, []).append(outcome.times)
    return [MeasuredSetting(setting=setting, repeats=tuple(times)) for setting, times in repeats.items()]


def read_record(run_dir: Path) -> RunRecord | None:
    """run.json of a run that ended, or None without one. Raises DataError for a file that this module did not write."""
    path = run_dir / RECORD_NAME
    return read_json(path, RunRecord, remedy="Move the file away.") if path.exists() else None


def _has_metrics(run_dir: Path, setting: Setting) -> bool:
    try:
        read_step_times(run_dir / METRICS_NAME, num_steps=setting.steps, num_warmup_steps=0)
    except DataError:
        return False
    return True


def _judge(
    record: RunRecord, run_dir: Path, setting: Setting, repeat: int, num_warmup_steps: int, *, is_new: bool
) -> Outcome:
    times = None
    if record.status == "complete":
        times = read_step_times(
            run_dir / METRICS_NAME, num_steps=setting.steps, num_warmup_steps=min(num_warmup_steps, setting.steps - 1)
        )
    return Outcome(setting=setting, repeat=repeat, times=times, reason=record.reason, is_new=is_new)


# --- one run ---------------------------------------------------------------------------------------------------------


def _run_setting(setting: Setting, machine: Machine, run_dir: Path, repeat: int) -> RunRecord:
    """Train in an empty folder, and write the record of how it ended."""
    if run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True)
    command = build_command(setting, machine, run_dir / METRICS_NAME)
    started_at_s = time.time()
    with (run_dir / OUTPUT_NAME).open("wb") as output:
        exit_code = _wait(command, machine, output)
    reason = None
    if exit_code is None:
        reason = f"did not end within {machine.timeout_s:g} s"
    elif exit_code != 0:
        reason = f"exit code {exit_code}: {read_reason(run_dir / OUTPUT_NAME)}"
    elif not _has_metrics(run_dir, setting):
        reason = f"ended without all {setting.steps} steps in {METRICS_NAME}"
    record = RunRecord(status="complete" if reason is None else "failed", reason=reason)
    content = {
        **asdict(record),
        "exit_code": exit_code,
        "started_at_s": started_at_s,
        "elapsed_s": time.time() - started_at_s,
        "command": command,
        "settings": describe_run(setting, machine, repeat),
    }
    publish_files({run_dir / RECORD_NAME: json.dumps(content, indent=2) + "\n"})
    return record


def build_command(setting: Setting, machine: Machine, metrics_path: Path) -> list[str]:
    launch = ["-m", LAUNCH_MODULE, "--standalone", "--nproc-per-node", str(setting.layout.world_size), "--"]
    outputs = ["--platform", machine.platform, "--metrics-path", str(metrics_path)]
    return [sys.executable, *launch, *setting.list_flags(), *outputs]


def _wait(command: Sequence[str], machine: Machine, output: Any) -> int | None:
    """The exit code of the run, or None if it exceeded its time. No process of it is left running."""
    environment = os.environ | {"OMP_NUM_THREADS": str(machine.num_threads)}
    if machine.platform == "cuda":
        # CUDA_DEVICE_MAX_CONNECTIONS: megatron refuses FSDP with 1, and tensor parallelism before Blackwell needs 1.
        connections = "8" if "--use-megatron-fsdp" in command else "1"
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    # In a session of its own, the run does not get the terminal's Ctrl-C. The finally block below ends it in order.
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(machine.timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            stop_tree(process)


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and its training processes: with SIGTERM, and those left after STOP_GRACE_S with SIGKILL."""
    import psutil

    try:
        # Listed before the signal: without the launcher, its children have another parent and are not found.
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=STOP_GRACE_S)
    for member in alive:
        member.kill()
    process.wait()


def read_reason(output_path: Path) -> str:
    """The errors that a run printed, otherwise the last lines of its output, in one line."""
    lines = [line.strip() for line in output_path.read_text(encoding="utf8", errors="replace").splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    chosen = list(dict.fromkeys(errors)) or [line for line in lines if line][-NUM_REASON_LINES:]
    return " | ".join(chosen) or "no output"
