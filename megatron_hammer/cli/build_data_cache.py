"""Build the sample indices of a training run beforehand, in one process, so that no rank waits for them.

    hammer build-data-cache --preset hammer-1b4 --data-path data/corpus_text_document --data-cache-path cache

Takes the flags of the training run. The indices depend on its data, split, seed, sequence length and number of samples.
"""

import sys
from collections.abc import Sequence

from megatron_hammer.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Raises ConfigError without --data-cache-path, or for data that does not fit."""
    from megatron_hammer.training.pretrain import open_terminal, prepare

    # cpu: building indices needs no GPU, so it can run on a login node.
    arguments = prepare(["--platform", "cpu", *(sys.argv[1:] if argv is None else argv)], is_plan=True)
    cache_dir = arguments.settings.data.cache_dir
    # Without the flag, Megatron puts the indices beside the data.
    if cache_dir is None:
        raise ConfigError(
            "data-cache-path: must name the folder that training will read, got none. Pass --data-cache-path DIR."
        )

    from megatron_hammer.config.arguments import finalize_arguments
    from megatron_hammer.config.datasets import build_data_cache
    from megatron_hammer.config.preflight.data import find_data_problems

    problems = find_data_problems(
        arguments.settings, arguments.plan
    )  # the rest of preflight is about the machine that will train
    if problems:
        raise ConfigError(*problems)
    plan = arguments.require_plan()
    terminal = open_terminal(plan)
    counts = build_data_cache(arguments, plan, finalize_arguments(arguments))
    samples = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{cache_dir}: samples: {samples}", file=terminal)
