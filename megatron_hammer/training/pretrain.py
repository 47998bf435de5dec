"""The main path: from a command line to a trained checkpoint. Read this file first.

    torchrun --nproc-per-node 8 -m megatron_hammer.training.pretrain --preset hammer-1b4 --data-path data/corpus ...
    python -m megatron_hammer.training.pretrain --preset hammer-1b4 --world-size 64 --dry-run

The engine is megatron.training.pretrain, unmodified; we hand it a configuration, a dataset provider and a forward step.
"""

import sys
from collections.abc import Sequence

from megatron_hammer.errors import exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Train, or with --dry-run say what would be trained. Raises HammerError for every problem a user can fix."""
    argv = sys.argv[1:] if argv is None else argv

    from megatron_hammer.config.arguments import parse_arguments, read_option
    from megatron_hammer.platforms import megatron_compat
    from megatron_hammer.platforms.select import select_backend, select_platform

    platform = select_platform(read_option(argv, "--platform", "auto"))
    backend = select_backend(read_option(argv, "--backend", "auto"), platform=platform)
    megatron_compat.install(platform)
    arguments = parse_arguments(argv, platform=platform, backend=backend)
    train(arguments)


def train(arguments) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_hammer.config.arguments import build_config_container, finalize_arguments
    from megatron_hammer.config.datasets import build_dataset_provider
    from megatron_hammer.training.forward_step import ForwardStep

    namespace = arguments.namespace
    finalize_arguments(namespace)
    container = build_config_container(namespace)
    provider = build_dataset_provider(namespace)
    step = ForwardStep(
        micro_batch_size=namespace.micro_batch_size,
        eval_micro_batch_size=namespace.eval_micro_batch_size,
        seq_length=namespace.seq_length,
        context_parallel_size=namespace.context_parallel_size,
        has_attention_mask=namespace.create_attention_mask_in_dataloader,
        pipeline_model_parallel_size=namespace.pipeline_model_parallel_size,
    )
    pretrain(container, provider, ModelType.encoder_or_decoder, step)


if __name__ == "__main__":
    main()
