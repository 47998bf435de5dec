"""Fit a scaling law of the loss to several runs, and find the best size for a budget.

L(N, D) = E + A / N^alpha + B / D^beta as approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556): Huber loss of the log
residuals, from many starts, with intervals from a bootstrap over whole runs.

  fit --table losses.csv --budget-flops 1e21 1e22 --output-dir study
  fit --runs hammer-tiny=runs/a hammer-tiny=runs/b tiny-llm-zh-16m=runs/c ... --flop-convention A
"""

import argparse
import json
import math
from pathlib import Path

from megatron_hammer.cli.scaling_study.result_files import require_folder
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.model.accounting import FLOP_CONVENTIONS, FlopConvention
from megatron_hammer.scaling.loss_law import runs as loss_law_runs
from megatron_hammer.scaling.loss_law.gpu_cost import read_gpu_cost
from megatron_hammer.scaling.loss_law.law import LossFit, LossRun, fit_loss_law
from megatron_hammer.scaling.loss_law.optimum import TokenCost, find_optimum, fit_flops_cost, six_nd_cost
from megatron_hammer.scaling.loss_law.report import LossStudy, as_object, draw_study, print_study

# 6 FLOPs per parameter and token: 2 forward and 4 backward (Kaplan et al. 2020, arXiv 2001.08361).
SIX_ND = "6ND"
WINDOW_RATIO = 0.05
MOST_SAMPLES = 100_000  # more move an interval's ends by less than is shown, and need memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, what N and compute count, the budgets, and the output. `run` refuses flags without effect."""
    add_run_arguments(parser)
    parser.add_argument(
        "--parameters",
        choices=tuple(loss_law_runs.PARAMETER_CONVENTIONS),
        default="total",
        help="what N counts for --runs; the N of a table is used unchanged (%(default)s)",
    )
    parser.add_argument(
        "--flop-convention",
        choices=(SIX_ND, "A", "B", "D"),
        default=SIX_ND,
        help="of compute: 6 N D, or a letter of megatron_hammer/model/flops.py (%(default)s)",
    )
    parser.add_argument("--budget-flops", nargs="+", type=float, default=[], metavar="FLOPS", help="budgets to spend")
    parser.add_argument(
        "--budget-gpu-hours", nargs="+", type=float, default=[], metavar="HOURS", help="budgets at --projection's speed"
    )
    parser.add_argument(
        "--projection",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="projection.json of `project`, of one model or better of several sizes on the same GPUs",
    )
    parser.add_argument(
        "--projection-gpus", type=int, help="the number of GPUs of --projection (default: the only one)"
    )
    parser.add_argument("--confidence", type=float, default=0.9, help="of every interval (%(default)s)")
    parser.add_argument("--bootstrap-samples", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    parser.add_argument("--output-dir", type=Path, help="writes loss_law.json and loss_law.png there")
    parser.add_argument("--json", action="store_true", help="the whole result as one JSON object on stdout")


def add_run_arguments(group: argparse._ActionsContainer) -> None:
    """The finished runs of the law; `plan` has the same flags. `read_loss_runs` reads them."""
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--runs",
        nargs="+",
        metavar="MODEL=PATH",
        help="finished trainings: MODEL is a preset, a Hugging Face folder or a number of parameters, PATH the folder "
        "of metrics.jsonl (or the file); PRESET@4000=PATH for another vocabulary size than the preset's",
    )
    source.add_argument(
        "--table", type=Path, help="CSV with num_parameters, num_tokens, loss and, if known, run and tokenizer"
    )
    group.add_argument(
        "--leave-out", nargs="+", default=[], metavar="RUN", help="runs of these names, such as diverged"
    )
    group.add_argument(
        "--loss",
        choices=("auto", "validation", "training"),
        default="auto",
        help="auto: validation at the last step where every run has it, else training (%(default)s)",
    )
    group.add_argument("--validation-set", help="which one of validation.jsonl (default: the only one)")
    group.add_argument(
        "--window-ratio",
        type=float,
        default=WINDOW_RATIO,
        help="share of a run's steps, at its end, whose training losses are averaged (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the fitted law, after the files of --output-dir are written. Raises ConfigError or DataError."""
    _check_arguments(arguments)
    flops = None if arguments.flop_convention == SIX_ND else arguments.flop_convention
    runs = read_loss_runs(arguments, flops)
    require_folder(arguments.output_dir, ("loss_law.json", "loss_law.png"))
    fit = fit_loss_law(
        runs, num_samples=arguments.bootstrap_samples, confidence=arguments.confidence, seed=arguments.seed
    )
    study = _build_study(arguments, fit)
    # One text for the file and for stdout, so the two cannot differ.
    text = json.dumps(as_object(study), indent=2)
    if arguments.output_dir is not None:
        publish_results(
            {
                arguments.output_dir / "loss_law.json": text + "\n",
                arguments.output_dir / "loss_law.png": draw_study(study),
            }
        )
    if arguments.json:
        print(text)
    else:
        print_study(study)


def _check_arguments(arguments: argparse.Namespace) -> None:
    problems = [*find_run_problems(arguments), *_find_lonely_flags(arguments)]
    if not 0 < arguments.confidence < 1:
        problems.append(f"confidence: must be between 0 and 1, got {arguments.confidence:g}. Pass 0.9 for 90%.")
    # An interval of 90% cuts off 5% at each end, which are only 5 of 100 samples.
    if not 100 <= arguments.bootstrap_samples <= MOST_SAMPLES:
        problems.append(
            f"bootstrap-samples: must be at least 100 for an interval and at most {MOST_SAMPLES:,}, "
            f"got {arguments.bootstrap_samples}. Pass 1000."
        )
    if arguments.seed < 0:
        problems.append(f"seed: must be at least 0, got {arguments.seed}. Pass another.")
    problems += [
        f"{flag}: must be positive and finite, got {budget:g}. {remedy}."
        for flag, budgets, remedy in (
            ("budget-flops", arguments.budget_flops, "Pass FLOPs, such as 1e21"),
            ("budget-gpu-hours", arguments.budget_gpu_hours, "Pass hours, such as 5000"),
        )
        for budget in budgets
        # float() also reads "inf" and "nan", which argparse accepts.
        if not (math.isfinite(budget) and budget > 0)
    ]
    if problems:
        raise ConfigError(*problems)


def find_run_problems(arguments: argparse.Namespace) -> list[str]:
    """Of the flags of `add_run_arguments`: values that cannot be meant, and flags that would have no effect."""
    problems = []
    if not 0 < arguments.window_ratio <= 1:
        problems.append(f"window-ratio: must be above 0 and at most 1, got {arguments.window_ratio:g}. Pass 0.05.")
    name = arguments.validation_set
    if arguments.table is not None:
        # argparse does not tell a typed default from an absent flag, so only other values are refused.
        given = {
            "loss": arguments.loss != "auto",
            "validation-set": name is not None,
            "window-ratio": arguments.window_ratio != WINDOW_RATIO,
        }
        problems += [_refuse_with_table(flag) for flag, is_given in given.items() if is_given]
    # Training losses have no validation set.
    elif name is not None and arguments.loss == "training":
        problems.append(f"validation-set: must be left out with --loss training, got {name}. Drop one of the two.")
    return problems


def _refuse_with_table(flag: str) -> str:
    return f"{flag}: must be left out with --table, whose columns say it. Use --runs."


def _find_lonely_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags that would have no effect together with the others. They are errors, because no flag is ignored."""
    problems = []
    if arguments.table is not None:
        given = {
            "parameters": arguments.parameters != "total",
            "flop-convention": arguments.flop_convention != SIX_ND,
        }
        problems += [_refuse_with_table(flag) for flag, is_given in given.items() if is_given]
    if arguments.projection_gpus is not None and not arguments.projection:
        number = arguments.projection_gpus
        problems.append(f"projection-gpus: must come with --projection, got {number} alone. Pass both.")
    pair = {"budget-gpu-hours": arguments.budget_gpu_hours, "projection": arguments.projection}
    problems += [
        f"{flag}: must come with --{other}, got it alone. "
        "A projection is made by scaling_study.py project --output-dir DIR."
        # Each of the two needs the other, so the pair is checked in both directions.
        for flag, other in (tuple(pair), tuple(pair)[::-1])
        if pair[flag] and not pair[other]
    ]
    return problems


def read_loss_runs(arguments: argparse.Namespace, flops: FlopConvention | None = None) -> list[LossRun]:
    """The runs of --table or --runs. flops: of LossRun.flops_per_token. Raises DataError or ConfigError."""
    if arguments.table is not None:
        runs = loss_law_runs.read_table(arguments.table)
        return loss_law_runs.leave_out(runs, [run.name for run in runs], arguments.leave_out)
    # Left out before they are read: a diverged run may have files that cannot be read.
    specs = loss_law_runs.leave_out(arguments.runs, loss_law_runs.name_runs(arguments.runs), arguments.leave_out)
    options = loss_law_runs.ReadOptions(
        parameters=arguments.parameters,
        flops=flops,
        loss=arguments.loss,
        validation_set=arguments.validation_set,
        window_ratio=arguments.window_ratio,
    )
    return loss_law_runs.read_metrics_runs(specs, options, arguments.read_hf_model)


def describe_size(arguments: argparse.Namespace) -> str:
    """What N counts."""
    if arguments.table is not None:
        return f"as {arguments.table.name} counts them"
    return loss_law_runs.PARAMETER_CONVENTIONS[arguments.parameters]


def _build_study(arguments: argparse.Namespace, fit: LossFit) -> LossStudy:
    convention = describe_size(arguments)
    cost = _build_cost(arguments, fit, convention)
    optima = [find_optimum(fit, cost, budget) for budget in arguments.budget_flops]
    if arguments.budget_gpu_hours:
        gpu_cost = read_gpu_cost(arguments.projection, arguments.projection_gpus, arguments.parameters)
        # A projection's cost is in GPU seconds.
        optima += [find_optimum(fit, gpu_cost, 3600 * hours) for hours in arguments.budget_gpu_hours]
    notes = (*fit.notes, *(note for optimum in optima for note in optimum.notes))
    return LossStudy(fit=fit, parameter_convention=convention, cost=cost, optima=tuple(optima), notes=notes)


def _build_cost(arguments: argparse.Namespace, fit: LossFit, convention: str) -> TokenCost:
    if arguments.flop_convention == SIX_ND:
        return six_nd_cost(convention)
    return fit_flops_cost(fit.runs, arguments.flop_convention, FLOP_CONVENTIONS[arguments.flop_convention])
