"""Compare machines for one training: days, cost, energy and CO2 of each one's best layout, with their uncertainty.

An option is a GPU, its number, and if wanted the cluster and the precision: GPU[@CLUSTER]:N[,N...][:PRECISION]. Says
which option is the fastest and the cheapest, or that it is a tie, and which ones are on the front of days against cost.

  compare --preset llama3-8b --job a100-sxm-80gb:512 h100-sxm:256 b200-sxm:128:mxfp8 --usd-per-gpu-hour 2
  compare --preset llama3-70b --train-tokens 2T --job h100-sxm@aws-p5:512,1024 a100-sxm-80gb@aws-p4de:1024 \\
      --grid-kgco2-per-kwh aws-p5=0.37 aws-p4de=0.06
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_hammer.cli.scaling_study.result_files import describe_place, require_folder, write_results
from megatron_hammer.cli.scaling_study.study_arguments import add_study_arguments, build_study
from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.decisions.compare import Comparison, Option, build_option, compare
from megatron_hammer.scaling.decisions.compare_report import (
    build_document,
    build_tables,
    describe_comparison,
    draw_front,
    format_csv,
    name_option,
)
from megatron_hammer.scaling.plan import PRECISIONS
from megatron_hammer.scaling.report.projection_file import format_json
from megatron_hammer.scaling.report.projection_tables import print_table
from megatron_hammer.scaling.search.projection import Study
from megatron_hammer.scaling.search.search import build_search
from megatron_hammer.scaling.search.study_problems import MOST_USD_PER_GPU_HOUR

JOB = re.compile(r"(?P<gpu>[^@:]+)(@(?P<cluster>[^@:]+))?:(?P<gpus>\d{1,12}(,\d{1,12})*)(:(?P<precision>\w+))?")
# Flags with a value for each machine, and its smallest and largest value. A price or a grid of 0 would make the ratio
# to the best option infinite.
LIMITS = {"usd-per-gpu-hour": (1e-6, MOST_USD_PER_GPU_HOUR), "pue": (1.0, 10.0), "grid-kgco2-per-kwh": (1e-6, 10.0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, their prices and grids, the training, and the output."""
    parser.add_argument(
        "--job",
        nargs="+",
        required=True,
        metavar="GPU[@CLUSTER]:N[,N...][:PRECISION]",
        help="options, such as a100-sxm-80gb:512 h100-sxm@aws-p5:128,256:fp8",
    )
    prices = parser.add_argument_group("one number for all options, or NAME=NUMBER for a GPU or a cluster")
    for flag, words in (
        ("usd-per-gpu-hour", "prices (default: the cluster's, if known)"),
        ("pue", "power usage effectiveness of the building (default: the cluster's)"),
        ("grid-kgco2-per-kwh", "CO2 of the electricity; docs/scaling.md lists some grids (default: not counted)"),
    ):
        prices.add_argument(f"--{flag}", nargs="+", default=[], metavar="NUMBER", help=words)
    add_study_arguments(parser, has_machine=False)
    parser.add_argument(
        "--output-dir", type=Path, help="writes comparison.json, comparison.csv and comparison.png there"
    )
    parser.add_argument("--json", action="store_true", help="the comparison as one JSON object on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Print the decisions and the tables. Raises ConfigError, after everything is written, if no option fits."""
    studies = build_studies(arguments)
    grids = [_select_value(study, _read_values(arguments, "grid-kgco2-per-kwh")) for study in studies]
    require_folder(arguments.output_dir, ("comparison.json", "comparison.csv", "comparison.png"))
    coefficients = load_coefficients(arguments.coefficients)
    search = build_search(coefficients)
    options = []
    for study, kgco2_per_kwh in zip(studies, grids, strict=True):
        size = search.search_plans(study, study.gpu_counts[0])
        option = build_option(study, size, kgco2_per_kwh)
        found = f"{size.best.step.total_s:.3f} s per step" if size.best else "nothing fits"
        print(f"{name_option(option)}: {size.num_candidates:,} candidates, {found}", file=sys.stderr)
        options.append(option)
    comparison = compare(options, coefficients)
    document = format_json(build_document(comparison))
    if arguments.output_dir is not None:
        files = {"comparison.json": document, "comparison.csv": format_csv(comparison)}
        write_results(arguments.output_dir, {**files, "comparison.png": draw_front(comparison)})
    if arguments.json:
        print(document, end="")
    else:
        _print_comparison(comparison)
    print(_summarise(options) + describe_place(arguments.output_dir), file=sys.stderr if arguments.json else sys.stdout)
    if not any(one.best for one in options):
        raise ConfigError(*(f"{name_option(one)}: {one.size.problem}" for one in options))


def _print_comparison(comparison: Comparison) -> None:
    tables = build_tables(comparison)
    if not tables:  # nothing fits: the problems follow as errors
        return
    for sentence in describe_comparison(comparison):
        print(sentence)
    for table in tables:
        print()
        print_table(table, sys.stdout)
    print()


def _summarise(options: Sequence[Option]) -> str:
    feasible = sum(one.best is not None for one in options)
    return (
        f"{len(options)} options, {feasible} feasible; {sum(one.size.num_candidates for one in options):,} candidates"
    )


def build_studies(arguments: argparse.Namespace) -> list[Study]:
    """One study for each option. Raises ConfigError with the problems of all options at once."""
    studies: list[Study] = []
    by_job: dict[str, Sequence[str]] = {}
    for job in arguments.job:
        try:
            studies += _build_job_studies(arguments, job)
        except ConfigError as error:
            by_job[job] = error.problems
    problems = _merge_problems(by_job, len(arguments.job))
    for flag in LIMITS:
        try:
            values = _read_values(arguments, flag)
        except ConfigError as error:
            problems += error.problems
            continue
        names = {name for study in studies for name in (study.gpu.name, study.cluster.name)}
        problems += [
            f"{flag}: must name a GPU or a cluster of an option, got {name}. "
            f"Use one of {', '.join(sorted(names))}, or a number alone for all."
            for name in values
            if name and name not in names and studies
        ]
    problems += _find_study_list_problems(studies) if not problems else []
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    prices, pues = (_read_values(arguments, flag) for flag in ("usd-per-gpu-hour", "pue"))
    return [_set_values(study, prices, pues) for study in studies]


def _merge_problems(by_job: dict[str, Sequence[str]], num_jobs: int) -> list[str]:
    """Problems of all options once, such as an unknown preset; the others with the option that has them."""
    everywhere = [
        problem
        for problem in next(iter(by_job.values()), ())
        if len(by_job) == num_jobs and all(problem in problems for problems in by_job.values())
    ]
    own = [f"{job}: {one}" for job, problems in by_job.items() for one in problems if one not in everywhere]
    return everywhere + own


def _build_job_studies(arguments: argparse.Namespace, job: str) -> list[Study]:
    match = JOB.fullmatch(job)
    if match is None:
        raise ConfigError(
            f"job: must be GPU[@CLUSTER]:N[,N...][:PRECISION], got {job!r}. "
            "Pass h100-sxm:256 or h100-sxm@aws-p5:64,128:fp8."
        )
    precision = match["precision"] or arguments.precision
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision: must be of {', '.join(PRECISIONS)}, got {precision}. Choose one of them.")
    # The flags of a study on one machine, as `project` has them.
    flags = {"gpu": match["gpu"], "cluster": match["cluster"], "gpus": match["gpus"], "precision": precision}
    # Prices are per option here, and come to the study after this.
    own = argparse.Namespace(**{**vars(arguments), **flags, "usd_per_gpu_hour": None})
    study = build_study(own, arguments.read_hf_model)
    return [replace(study, gpu_counts=(count,)) for count in study.gpu_counts]


def _find_study_list_problems(studies: Sequence[Study]) -> list[str]:
    keys = [(study.gpu.name, study.cluster.name, study.gpu_counts, study.precision) for study in studies]
    problems = []
    if len(keys) < 2:
        problems.append("job: must name at least two options, got one. Pass --job a100-sxm-80gb:512 h100-sxm:256.")
    for key in dict.fromkeys(key for key in keys if keys.count(key) > 1):
        problems.append(f"job: must name each option once, got {key[0]}@{key[1]}:{key[2][0]} twice. Drop one.")
    if studies and studies[0].train_tokens is None:
        problems.append("train-tokens: must be given for a model without a recipe, got none. Pass --train-tokens 1T.")
    return problems


def _read_values(arguments: argparse.Namespace, flag: str) -> dict[str, float]:
    """NAME=NUMBER words of a flag by their names; the name of a number alone is empty. ConfigError for other words."""
    values: dict[str, float] = {}
    problems = []
    for word in getattr(arguments, flag.replace("-", "_")):
        name, _, text = word.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        least, most = LIMITS[flag]
        if not least <= value <= most:
            remedy = f"Correct it, or leave {name or 'the flag'} out."
            bounds = f"from {least:g} to {most:g}"
            problems.append(f"{flag}: must be a number {bounds}, or NAME=NUMBER, got {word!r}. {remedy}")
        elif name in values:
            problems.append(f"{flag}: must be given once for each name, got {word!r} again. Drop one of the two.")
        values[name] = value
    if problems:
        raise ConfigError(*problems)
    return values


def _select_value(study: Study, values: dict[str, float]) -> float | None:
    """The value of the cluster, otherwise that of the GPU, otherwise that of all."""
    return values.get(study.cluster.name, values.get(study.gpu.name, values.get("")))


def _set_values(study: Study, prices: dict[str, float], pues: dict[str, float]) -> Study:
    price, pue = _select_value(study, prices), _select_value(study, pues)
    if price is not None:
        study = replace(study, usd_per_gpu_hour=price)
    if pue is not None:
        study = replace(study, cluster=replace(study.cluster, power_usage_effectiveness=pue))
    return study
