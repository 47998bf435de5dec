"""What a cluster will do with a model: projected, measured, calibrated and validated.

project: the best layouts at each number of GPUs, with step time, memory, cost and an error band.
compare: several machines for one training, with days, cost, energy and CO2.
sensitivity: what one change at a time does to the time and to the best layout.
diff: two studies, with the inputs and layouts that differ and why.
emit: launch scripts of chosen rows of a projection.
trace: a predicted step as a timeline for chrome://tracing and Perfetto.
plan: from a target loss or tokens to size, GPUs, days and cost, with intervals.
goodput: save interval, spare nodes and days of chosen rows, with failures.
measure: a sweep of real short trainings.
profile: this machine's operators, timed.
calibrate: fit the model's coefficients to measured runs.
validate: predictions against measured runs, with the errors by source.
fit: a scaling law of the loss, and the best size for a budget.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hammer.errors import exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.model.shape import ModelShape

COMMANDS: tuple[str, ...] = (
    "project",
    "compare",
    "sensitivity",
    "diff",
    "emit",
    "trace",
    "plan",
    "goodput",
    "measure",
    "profile",
    "calibrate",
    "validate",
    "fit",
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command and its flags. `run` of the result is the command's function."""
    parser = CommandParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        # The names are listed above, and not found in the folder, so that the order of the help is fixed.
        module = importlib.import_module(f"megatron_hammer.cli.scaling_study.{name}")
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.splitlines()[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, read_hf_model=read_hf_model)
    return parser.parse_args(argv)


def read_hf_model(path: Path) -> ModelShape:
    """The model of a Hugging Face folder, or of a config.json under any name.

    It is passed to scaling/, which stands below checkpoint/ and may not import it.
    """
    from megatron_hammer.checkpoint.hugging_face.studied_families.catalogue import read_studied_model

    return read_studied_model(path)


@exit_on_user_error
@exit_on_interrupt("what was written is complete")
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; see --help. User errors exit 2; measure exits 1 if a run failed."""
    arguments = parse_arguments(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)
