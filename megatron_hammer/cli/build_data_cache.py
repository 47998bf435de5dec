"""Build the sample indices of a training run beforehand, in one process, so that no rank waits for them.

    hammer build-data-cache --preset hammer-1b4 --data-path data/corpus_text_document --data-cache-path cache

Takes the flags of the training run. The indices depend on its data, split, seed, sequence length and number of samples.
"""

import sys
from collections.abc import Sequence

from megatron_hammer.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    from megatron_hammer.training.pretrain import open_terminal, prepare

    arguments = prepare(["--platform", "cpu", *(sys.argv[1:] if argv is None else argv)], is_plan=True)
    if arguments.namespace.data_cache_path is None:
        raise ConfigError(
            "data-cache-path: must name the folder that training will read, got none. Pass --data-cache-path DIR."
        )

    from megatron_hammer.config.arguments import finalize_arguments
    from megatron_hammer.config.datasets import build_data_cache
    from megatron_hammer.config.preflight.data import find_data_problems

    problems = find_data_problems(arguments)  # the rest of preflight is about the machine that will train
    if problems:
        raise ConfigError(*problems)
    terminal = open_terminal(arguments)
    finalize_arguments(arguments.namespace)
    counts = build_data_cache(arguments.namespace)
    samples = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    print(f"{arguments.namespace.data_cache_path}: samples: {samples}", file=terminal)
