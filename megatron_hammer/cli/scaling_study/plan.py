"""Plan a training run: from a target loss or a number of tokens to size, tokens, GPUs, days and cost, with intervals.

The loss law is fitted to finished runs, as `fit` does it. The size that it chooses gets the proportions of --preset;
with --keep-model the model itself is trained. Every number of GPUs is searched as `project` does it, and failures are
added as `goodput` does it. What lies beyond the runs of the law is marked as extrapolated.

  plan --table losses.csv --target-loss 2.1 --preset llama3-8b --gpu h100-sxm --gpus 256,1024 --deadline-days 60
  plan --table losses.csv --train-tokens 300B --preset hammer-1b4 --gpu a100-sxm-80gb --gpus 64,128 \\
      --usd-per-gpu-hour 2 --budget-usd 100000
  plan --runs hammer-tiny=runs/a hammer-tiny=runs/b tiny-llm-zh-16m=runs/c ... --target-loss 3 --preset hammer-1b4 ...
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.cli.scaling_study.fit import (
    add_run_arguments,
    describe_size,
    find_run_problems,
    read_loss_runs,
)
from megatron_hammer.cli.scaling_study.goodput import add_operation_arguments, build_operations
from megatron_hammer.cli.scaling_study.result_files import require_folder
from megatron_hammer.cli.scaling_study.study_arguments import add_study_arguments, build_study
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.decisions.goodput_report import list_assumptions
from megatron_hammer.scaling.decisions.training_plan import Target, TrainingPlan, choose_run, plan_training
from megatron_hammer.scaling.decisions.training_plan_report import as_object, build_plan_table, describe_decision
from megatron_hammer.scaling.loss_law.law import fit_loss_law
from megatron_hammer.scaling.loss_law.optimum import six_nd_cost
from megatron_hammer.scaling.loss_law.runs import PARAMETER_CONVENTIONS
from megatron_hammer.scaling.report.projection_file import format_json
from megatron_hammer.scaling.report.projection_tables import print_table
from megatron_hammer.scaling.search.projection import Study
from megatron_hammer.scaling.search.search import build_search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The law and its target, the study, how the cluster is run, and the output."""
    law = parser.add_argument_group("loss law and target")
    add_run_arguments(law)
    law.add_argument(
        "--parameters",
        choices=tuple(PARAMETER_CONVENTIONS),
        default="total",
        help="what N counts, also in a table (%(default)s)",
    )
    law.add_argument("--target-loss", type=float, metavar="LOSS", help="instead of --train-tokens, in nats per token")
    law.add_argument("--keep-model", action="store_true", help="train the model as it is, instead of the best size")
    law.add_argument("--deadline-days", type=float, metavar="DAYS", help="with failures (default: none)")
    law.add_argument("--budget-usd", type=float, metavar="USD", help="of GPU-hours at their price (default: none)")
    add_study_arguments(parser)
    add_operation_arguments(parser)
    parser.add_argument("--output-dir", type=Path, help="writes plan.json there")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Print the plan. Raises ConfigError, after it is written, if no number of GPUs fulfils it."""
    operations = build_operations(arguments)
    study = build_study(arguments, arguments.read_hf_model)
    target = build_target(arguments, study)
    require_folder(arguments.output_dir, ("plan.json",))
    fit = fit_loss_law(read_loss_runs(arguments), seed=arguments.seed)
    cost = six_nd_cost(describe_size(arguments))
    chosen = choose_run(fit, cost, target, study.model, arguments.parameters)
    search = build_search(load_coefficients(arguments.coefficients))
    plan = plan_training(chosen, study, search, operations, target)
    text = format_json(as_object(plan))
    if arguments.output_dir is not None:
        publish_results({arguments.output_dir / "plan.json": text})
    if arguments.json:
        print(text, end="")
    else:
        _print_plan(plan, list_assumptions(operations))
    if plan.chosen is None:
        raise ConfigError(*plan.missing)


def build_target(arguments: argparse.Namespace, study: Study) -> Target:
    """Raises ConfigError for targets that contradict one another or cannot be meant."""
    problems = find_run_problems(arguments)
    if (arguments.target_loss is None) == (arguments.train_tokens is None):
        given = "both" if arguments.target_loss is not None else "neither"
        problems.append(f"target-loss: exactly one of it and --train-tokens must be given, got {given}. Pass one.")
    for flag in ("target_loss", "deadline_days", "budget_usd"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            problems.append(f"{flag.replace('_', '-')}: must be above 0, got {value:g}. Correct it.")
    if arguments.budget_usd is not None and not study.usd_per_gpu_hour:
        problems.append(
            f"budget-usd: must come with a price, got none for {study.cluster.name}. Pass --usd-per-gpu-hour."
        )
    if problems:
        raise ConfigError(*problems)
    return Target(
        loss=arguments.target_loss,
        num_tokens=None if arguments.train_tokens is None else study.train_tokens,
        keeps_model=arguments.keep_model,
        deadline_days=arguments.deadline_days,
        budget_usd=arguments.budget_usd,
    )


def _print_plan(plan: TrainingPlan, assumptions: list[str]) -> None:
    for sentence in describe_decision(plan):
        print(sentence)
    print()
    table = build_plan_table(plan)
    if any(table.groups):
        print_table(table, sys.stdout)
    for size in plan.sizes:
        if size.problem is not None:
            print(size.problem)
    for note in plan.run.notes:
        print(f"note: {note}")
    for sentence in assumptions:
        print(sentence)
    num_good = sum(size.good is not None for size in plan.sizes)
    print(f"{len(plan.sizes)} sizes, {num_good} with a layout that fits and makes progress")
