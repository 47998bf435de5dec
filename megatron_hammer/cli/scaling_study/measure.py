"""A sweep of real short trainings.

Runs every combination of the presets, layouts, sizes and batches as a short training on this machine's GPUs or CPU
processes, and writes their step times to OUTPUT_DIR/runs.csv, in the columns that calibrate and validate read. After an
interruption, run the same command again: it continues where it stopped. Training flags for every run follow after --:

    measure --presets hammer-tiny --layouts single,tp2,pp2,dp2 --output-dir sweep -- --data-path data/corpus
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results, require_results
from megatron_hammer.scaling.hardware.visible_gpus import find_gpus
from megatron_hammer.scaling.measured.run_sweep import (
    Machine,
    Outcome,
    collect_measured,
    describe_processes,
    run_sweep,
)
from megatron_hammer.scaling.measured.sweep import Setting, Sweep, list_settings, read_sweeps
from megatron_hammer.scaling.measured.sweep_results import build_row, describe_spread, format_rows

# The name that profile gives a CPU in gpus.toml.
CPU_TYPE = "cpu-core"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to vary, how often to run it, and on what. Every default of a size is the recipe's."""
    parser.add_argument("--output-dir", type=Path, required=True, help="runs.csv, and a folder for each run")
    parser.add_argument("--sweep", type=Path, metavar="FILE.toml", help="[[sweep]] tables instead of the flags below")
    sweep = parser.add_argument_group("what to vary (several values separated by commas)")
    sweep.add_argument("--presets", type=read_words, help="models with their recipes, such as hammer-tiny")
    sweep.add_argument(
        "--layouts",
        type=read_words,
        help="single, or sizes joined by hyphens: tp2-sp-pp2-vp2-dp2, sp for sequence parallelism, ddp for no "
        "distributed optimizer (default: single)",
    )
    sweep.add_argument("--micro-batch-sizes", type=read_sizes, help="default: the recipe's")
    sweep.add_argument("--global-batch-sizes", type=read_sizes, help="default: the recipe's")
    sweep.add_argument(
        "--samples-per-rank", type=read_sizes, help="global batch size per process, so that the batch grows"
    )
    sweep.add_argument("--seq-lengths", type=read_sizes, help="default: the recipe's")
    sweep.add_argument("--recompute", type=read_words, help="none, selective, full (default: none)")
    sweep.add_argument("--precision", help="fp32, bf16 or fp16 (default: the recipe's)")
    sweep.add_argument("--steps", type=int, help="of each run (default: 20)")
    parser.add_argument("--warmup-steps", type=int, default=5, help="dropped from each run (default: 5)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each setting, taken in turn (default: 1)")
    parser.add_argument(
        "--statistic",
        choices=["median", "fastest"],
        default="median",
        help="of the steps, for runs.csv; fastest for a busy machine (default: median)",
    )
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if there is")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of a process (default: 1)")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of one run (default: 1800)")
    parser.add_argument("--source", default="measured", help="name of these rows in runs.csv (default: measured)")
    parser.add_argument("--list", action="store_true", help="print the settings that would run, and stop")
    parser.add_argument("training_flags", nargs="*", metavar="-- FLAG", help="training flags of every run")


def read_words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def read_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in read_words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from None


def run(arguments: argparse.Namespace) -> None:
    """Measure the sweep and write runs.csv; exit code 1 if a run failed. --list only prints the settings."""
    check_numbers(arguments)
    settings = [setting for sweep in select_sweeps(arguments) for setting in list_settings(sweep)]
    # Two tables may ask for the same setting. Both would have the same folder.
    settings = list(dict.fromkeys(settings))
    if arguments.list:
        list_to_stdout(settings)
        return
    machine = select_machine(arguments, max(one.layout.world_size for one in settings))
    # Before the runs, which take long. The header is in every runs.csv of this command.
    require_results([arguments.output_dir / "runs.csv"], mark=format_rows(()))
    outcomes = run_sweep(
        settings,
        machine,
        arguments.output_dir,
        num_repeats=arguments.repeats,
        num_warmup_steps=arguments.warmup_steps,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_results(outcomes, machine, arguments)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for counts that leave nothing to measure."""
    problems = [
        f"{name}: must be at least {least}, got {getattr(arguments, name.replace('-', '_'))}. Raise it."
        # Zero warm-up steps are allowed: they only make the first step count.
        for name, least in (("repeats", 1), ("threads", 1), ("warmup-steps", 0))
        if getattr(arguments, name.replace("-", "_")) < least
    ]
    if problems:
        raise ConfigError(*problems)


def select_sweeps(arguments: argparse.Namespace) -> list[Sweep]:
    """From the file or from the flags, with the training flags of the command line behind their own."""
    names = [field.name for field in fields(Sweep) if field.name != "flags"]
    # None means that a flag was not given, so Sweep's own default holds.
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.sweep is not None and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"sweep: takes the place of {flags}, got both. Put them into {arguments.sweep}.")
    if arguments.sweep is None and "presets" not in given:
        raise ConfigError(
            "presets: must name one at least, got none. Pass --presets hammer-tiny, or --sweep FILE.toml."
        )
    sweeps = [Sweep(**given)] if arguments.sweep is None else read_sweeps(arguments.sweep)
    for sweep in sweeps:
        # Every step would be dropped as warm-up.
        if sweep.steps <= arguments.warmup_steps:
            raise ConfigError(
                f"steps: must be more than the warm-up, got steps={sweep.steps}, "
                f"warmup_steps={arguments.warmup_steps}. Raise --steps, or lower --warmup-steps."
            )
    # Behind: argparse takes the last value of a repeated flag, so the command line has the last word.
    return [replace(sweep, flags=(*sweep.flags, *arguments.training_flags)) for sweep in sweeps]


def list_to_stdout(settings: list[Setting]) -> None:
    for setting in settings:
        print(f"{setting.name}: {describe_processes(setting)}: {' '.join(setting.list_flags())}")
    print(f"{len(settings)} settings, none started", file=sys.stderr)


def select_machine(arguments: argparse.Namespace, most_processes: int) -> Machine:
    """Raises PlatformError where cuda is asked for and there is no GPU, ConfigError where a layout needs more GPUs."""
    gpu_names = find_gpus(arguments.platform)
    if 0 < len(gpu_names) < most_processes:
        raise ConfigError(
            f"layouts: must need at most the {len(gpu_names)} GPUs of this machine, got {most_processes} processes. "
            "Drop the larger ones, or pass --platform cpu."
        )
    return Machine(
        platform="cuda" if gpu_names else "cpu",
        gpu_type=gpu_names[0] if gpu_names else CPU_TYPE,
        num_threads=arguments.threads,
        timeout_s=arguments.timeout_s,
    )


def write_results(outcomes: list[Outcome], machine: Machine, arguments: argparse.Namespace) -> None:
    """runs.csv of what succeeded, a table, a summary; exit code 1 if a run failed."""
    measured = collect_measured(outcomes)
    rows = [
        build_row(entry, gpu_type=machine.gpu_type, source=arguments.source, statistic=arguments.statistic)
        for entry in measured
    ]
    path = arguments.output_dir / "runs.csv"
    # Also when runs failed: the finished ones need not be measured again.
    publish_results({path: format_rows(rows)}, mark=format_rows(()))
    for entry, row in zip(measured, rows, strict=True):
        print(f"{entry.setting.name}: {row['iteration_time_s']} s ({describe_spread(entry, arguments.statistic)})")
    failed = [outcome for outcome in outcomes if outcome.times is None]
    for outcome in failed:
        print(f"error: {outcome.setting.name}: {outcome.reason}", file=sys.stderr)
    num_new = sum(outcome.is_new for outcome in outcomes)
    print(
        f"{len(outcomes)} runs of {len(rows) + len({o.setting for o in failed} - {m.setting for m in measured})} "
        f"settings: {num_new} run now, {len(outcomes) - num_new} finished before, {len(failed)} failed; "
        f"{len(rows)} rows in {path}",
        file=sys.stderr,
    )
    if failed:
        # 1 and not 2: the command line was right, a training was not.
        sys.exit(1)
