"""How many samples a run draws: its global batch, and what it needs of every split. Pure; no torch, no megatron."""

import argparse

from megatron_hammer.config.model_from_arguments import build_layout


def select_global_batch_size(namespace: argparse.Namespace) -> int:
    """Megatron's default where none is given: one micro-batch on each data-parallel rank."""
    return namespace.global_batch_size or namespace.micro_batch_size * build_layout(namespace).data_parallel_size


def count_needed_samples(namespace: argparse.Namespace) -> dict[str, int]:
    """Samples that a run draws from each split, as megatron.training.get_train_valid_test_num_samples counts them.

    0 for validation by whole passes.
    """
    batch = select_global_batch_size(namespace)
    num_steps = namespace.train_iters or (namespace.train_samples or 0) // batch
    eval_samples = namespace.eval_iters * (namespace.eval_global_batch_size or batch)
    evaluations = 1 if namespace.skip_train else num_steps // namespace.eval_interval + 1
    if namespace.start_eval_at_iter is not None and not namespace.skip_train:
        evaluations = max(0, evaluations - namespace.start_eval_at_iter // namespace.eval_interval)
    return {
        "train": 0 if namespace.skip_train else namespace.train_samples or num_steps * batch,
        "valid": 0 if namespace.full_validation else evaluations * eval_samples,
        "test": eval_samples,
    }
