"""What changes if one thing changes: half the network, less memory, slower kernels, another vocabulary, and so on.

Searches the study again under each change. Shows the time per token, the new best layout, and how good the old best
one still is. Without --vary, a list of usual changes is made; a change is a factor, a percentage or a value.

  sensitivity --preset llama3-8b --gpu h100-sxm --gpus 256
  sensitivity --preset llama3-70b --gpu h100-sxm --gpus 512 --vary network=x0.5 memory=-10% vocabulary=256000
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.cli.scaling_study.result_files import describe_place, require_folder, write_results
from megatron_hammer.cli.scaling_study.study_arguments import add_study_arguments, build_study
from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.report.projection_file import format_json
from megatron_hammer.scaling.report.projection_tables import print_table
from megatron_hammer.scaling.sensitivity.sensitivity import estimate_sensitivity
from megatron_hammer.scaling.sensitivity.sensitivity_report import (
    build_document,
    build_table,
    describe_sensitivity,
    draw_tornado,
    format_csv,
)
from megatron_hammer.scaling.sensitivity.variations import (
    QUANTITIES,
    Case,
    Variation,
    apply_variation,
    list_usual_variations,
    parse_variation,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study of one number of GPUs, the changes, and the output."""
    add_study_arguments(parser, has_budget=False)
    parser.add_argument(
        "--vary",
        nargs="+",
        metavar="QUANTITY=CHANGE",
        help=f"changes such as network=x0.5, memory=-10%% or seq-length=8192, of {', '.join(QUANTITIES)} "
        "(default: the usual changes of all)",
    )
    parser.add_argument(
        "--top", type=int, default=20, metavar="K", help="best layouts whose order is compared (%(default)s)"
    )
    parser.add_argument(
        "--output-dir", type=Path, help="writes sensitivity.json, sensitivity.csv and sensitivity.png there"
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Print what matters and the table. A usual change that cannot be made is reported; one of --vary is an error."""
    study = build_study(arguments, arguments.read_hf_model)
    if len(study.gpu_counts) != 1:
        counts = ", ".join(map(str, study.gpu_counts))
        raise ConfigError(f"gpus: must be one number of GPUs, got {counts}. Vary it with --vary gpus=x2.")
    case = Case(study=study, coefficients=load_coefficients(arguments.coefficients))
    variations = list_usual_variations(case) if arguments.vary is None else read_variations(arguments.vary, case)
    require_folder(arguments.output_dir, ("sensitivity.json", "sensitivity.csv", "sensitivity.png"))
    result = estimate_sensitivity(case, variations, lambda label: print(f"search: {label}", file=sys.stderr))
    document = format_json(build_document(result))
    if arguments.output_dir is not None:
        files = {"sensitivity.json": document, "sensitivity.csv": format_csv(result)}
        write_results(arguments.output_dir, {**files, "sensitivity.png": draw_tornado(result)})
    if arguments.json:
        print(document, end="")
    else:
        for sentence in describe_sensitivity(result):
            print(sentence)
        print()
        print_table(build_table(result), sys.stdout)
        print()
    done = sum(one.problem is None for one in result.outcomes)
    layouts, place = len(result.base.projections), describe_place(arguments.output_dir)
    print(
        f"{len(result.outcomes)} changes, {done} with a result; {layouts} layouts of the base{place}",
        file=sys.stderr if arguments.json else sys.stdout,
    )


def read_variations(texts: list[str], case: Case) -> list[Variation]:
    """The changes of --vary. Raises ConfigError with the problems of all that cannot be read or made."""
    problems: list[str] = []
    variations = []
    for text in dict.fromkeys(texts):
        try:
            variation = parse_variation(text)
            apply_variation(case, variation)
            variations.append(variation)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return variations
