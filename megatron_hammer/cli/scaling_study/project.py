"""Project a training run on a cluster: the best layouts at each number of GPUs, with an error band.

Searches every layout that fits in memory and that Megatron would start. Gives the step time and its parts, speed,
memory, days, energy, cost, the knee of the scaling curve, plots and an HTML report.

  project --preset llama3-8b --gpu h100-sxm --gpus 8,64,512,4096
  project --preset llama3-70b --gpu h100-sxm --gpus 64,512,4096 --samples-per-gpu 0.5 --output-dir study
  project --hf-config Qwen3-8B/config.json --gpu a100-sxm-80gb --gpus 64 --global-batch-size 512 --train-tokens 1T
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_hammer.cli.scaling_study.result_files import describe_place, require_folder
from megatron_hammer.cli.scaling_study.study_arguments import add_study_arguments, build_study
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.model.accounting import FLOP_CONVENTIONS
from megatron_hammer.scaling.cost.coefficients import Coefficients, load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.report.projection_file import build_projection_document, format_csv, format_json
from megatron_hammer.scaling.report.projection_tables import describe_result, list_problems, print_tables
from megatron_hammer.scaling.search.projection import Overlay, Study, StudyResult, build_companion_study, find_knee
from megatron_hammer.scaling.search.reference import find_references
from megatron_hammer.scaling.search.search import Predict, Search, build_search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study (study_arguments.py), what is shown of it, and the output."""
    add_study_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--top", type=int, default=5, metavar="K", help="layouts shown at each size (%(default)s)")
    output.add_argument(
        "--knee",
        type=float,
        default=0.8,
        metavar="RATIO",
        help="scaling pays while a GPU reaches this ratio of its best speed at a smaller size (%(default)s)",
    )
    output.add_argument(
        "--mfu-convention", choices=tuple(FLOP_CONVENTIONS), default="A", help="counts the FLOPs of MFU (%(default)s)"
    )
    output.add_argument(
        "--overlay",
        type=Path,
        metavar="RUNS.csv",
        help="measured runs, as measure writes them, to show beside the projection",
    )
    output.add_argument(
        "--output-dir", type=Path, help="writes projection.json, projection.csv, plots, report.html there"
    )
    formats = output.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="the projection as one JSON object on stdout")
    formats.add_argument("--csv", action="store_true", help="one line per layout on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Print the best layouts. Raises ConfigError, after everything is written, if nothing fits at any size."""
    study = build_study(arguments, arguments.read_hf_model)
    if arguments.usd_per_gpu_hour is not None and study.train_tokens is None:
        raise ConfigError(
            f"usd-per-gpu-hour: must come with a number of tokens, got {arguments.usd_per_gpu_hour:g} for a model "
            "without a recipe. Pass --train-tokens, or leave the price out."
        )
    require_folder(arguments.output_dir, ("projection.json", "projection.csv", "report.html"))
    coefficients = load_coefficients(arguments.coefficients)
    predict = partial(predict_step, coefficients=coefficients)
    # Before the search, so that an unreadable file is reported at once.
    overlay = _build_overlay(arguments, study, predict, coefficients)
    search = build_search(coefficients)
    references = find_references(study, predict, estimate_heaviest_plan_stage)
    result = replace(_project(study, search, coefficients), overlay=overlay, references=references)
    companion = build_companion_study(study, result.sizes)
    if companion is not None:
        result = replace(result, companion=_project(companion, search, coefficients))
    if arguments.output_dir is not None:
        publish_results(_build_files(result, arguments.output_dir))
    _print_result(arguments, result)
    if not any(size.best for size in result.sizes):
        raise ConfigError(*list_problems(result))


def _build_overlay(
    arguments: argparse.Namespace, study: Study, predict: Predict, coefficients: Coefficients
) -> Overlay | None:
    if arguments.overlay is None:
        return None
    from megatron_hammer.scaling.report.overlay import build_overlay

    return build_overlay(
        arguments.overlay,
        study,
        predict,
        # Runs that the coefficients were fitted on are marked, because they are no test of them.
        fitted_fingerprints=frozenset(coefficients.provenance.get("fingerprints", ())),
        gpus_path=arguments.gpus_file,
        clusters_path=arguments.clusters_file,
    )


def _project(study: Study, search: Search, coefficients: Coefficients) -> StudyResult:
    """Every size of a study, with a line of progress for each."""
    sizes = []
    for num_gpus in study.gpu_counts:
        size = search.search_plans(study, num_gpus)
        found = f"{size.best.step.total_s:.3f} s per step" if size.best else "nothing fits"
        # Weak scaling: the batch grows with the GPUs. Strong scaling: it stays the same.
        kind = "weak" if study.is_weak else "strong"
        print(f"{kind} scaling, {num_gpus:,} GPUs: {size.num_candidates:,} candidates, {found}", file=sys.stderr)
        sizes.append(size)
    knee = find_knee(sizes, study.knee_ratio)
    return StudyResult(
        study=study, sizes=tuple(sizes), knee=knee, provenance=coefficients.provenance, coefficients=coefficients
    )


def _build_files(result: StudyResult, folder: Path) -> dict[Path, str | bytes]:
    """All files for --output-dir, built before the first byte is written."""
    # Imported here: drawing needs matplotlib, which a projection without files does not.
    from megatron_hammer.scaling.decisions.study_decision import decide_study
    from megatron_hammer.scaling.report.html_report import render_html_report
    from megatron_hammer.scaling.report.projection_plots import draw_plots

    plots = draw_plots(result)
    return {
        folder / "projection.json": format_json(build_projection_document(result)),
        folder / "projection.csv": format_csv(result),
        **{folder / f"{name}.png": image for name, image in plots.items()},
        folder / "report.html": render_html_report(result, plots, decide_study(result)),
    }


def _print_result(arguments: argparse.Namespace, result: StudyResult) -> None:
    if arguments.json:
        print(format_json(build_projection_document(result)), end="")
    elif arguments.csv:
        print(format_csv(result), end="")
    else:
        print_tables(result, sys.stdout)
    # With --json or --csv stdout is for programs, so the summary goes to stderr.
    print(
        describe_result(result) + describe_place(arguments.output_dir),
        file=sys.stderr if arguments.json or arguments.csv else sys.stdout,
    )
