"""Length of the run and learning rate: steps against samples, warm-up against decay."""

import argparse

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.preflight.values import flag_of


def find_schedule_problems(arguments: ParsedArguments) -> list[str]:
    """Steps against samples, warm-up against decay, and the learning rates."""
    namespace = arguments.namespace
    if namespace.skip_train:
        return []
    problems = _find_unit_problems(namespace)
    if not problems:
        problems += _find_warmup_problems(namespace)
    if namespace.lr is not None and namespace.min_lr is not None and namespace.min_lr > namespace.lr:
        problems.append(
            f"min-lr: must not be above lr, got min_lr={namespace.min_lr:g}, lr={namespace.lr:g}. "
            f"Pass --min-lr {namespace.lr / 10:g}, or a higher --lr."
        )
    if namespace.lr is not None and namespace.lr_warmup_init > namespace.lr:
        problems.append(
            f"lr-warmup-init: must not be above lr, got lr_warmup_init={namespace.lr_warmup_init:g}, "
            f"lr={namespace.lr:g}. Pass a lower --lr-warmup-init."
        )
    if namespace.lr_decay_style == "WSD" and not (namespace.lr_wsd_decay_iters or namespace.lr_wsd_decay_samples):
        problems.append(
            "lr-wsd-decay-iters: must be given with --lr-decay-style WSD, got lr_wsd_decay_iters=None. "
            "Pass the number of steps at the end over which the learning rate falls."
        )
    elif namespace.lr_decay_style == "WSD" and not problems:
        problems += _find_wsd_problems(namespace)
    return problems


def _find_unit_problems(namespace: argparse.Namespace) -> list[str]:
    """A run counts in steps or in samples; Megatron refuses a mixture."""
    if namespace.train_iters is not None and namespace.train_samples is not None:
        return [
            f"train-samples: a run has one length, got train_samples={namespace.train_samples}, "
            f"train_iters={namespace.train_iters}. Pass --train-iters or --train-samples."
        ]
    in_samples = namespace.train_samples is not None
    unit, other = ("samples", "iters") if in_samples else ("iters", "samples")
    problems = [
        f"{flag_of(name)}: must be counted like the run, got {name}={getattr(namespace, name)} with "
        f"--train-{unit}. Pass --{flag_of(name.replace(other, unit))}."
        for name in (f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}")
        if getattr(namespace, name)
    ]
    if namespace.lr_warmup_fraction is not None and getattr(namespace, f"lr_warmup_{unit}"):
        problems.append(
            f"lr-warmup-fraction: a warm-up has one length, got lr_warmup_fraction={namespace.lr_warmup_fraction:g}, "
            f"lr_warmup_{unit}={getattr(namespace, f'lr_warmup_{unit}')}. Pass --lr-warmup-{unit} 0 with it."
        )
    return problems


def _find_wsd_problems(namespace: argparse.Namespace) -> list[str]:
    """A fall that is longer than the run would begin below the peak, without a word from Megatron."""
    unit = "samples" if namespace.train_samples is not None else "iters"
    length = getattr(namespace, f"lr_decay_{unit}") or getattr(namespace, f"train_{unit}")
    fall = getattr(namespace, f"lr_wsd_decay_{unit}")
    if length is None or fall is None or fall <= length:
        return []
    return [
        f"lr-wsd-decay-{unit}: must be at most the {length} {unit} of the run (--lr-decay-{unit}, or --train-{unit}), "
        f"got lr_wsd_decay_{unit}={fall}. Pass --lr-wsd-decay-{unit} {max(1, length // 10)}."
    ]


def _find_warmup_problems(namespace: argparse.Namespace) -> list[str]:
    unit = "samples" if namespace.train_samples is not None else "iters"
    length = getattr(namespace, f"train_{unit}")
    decay = getattr(namespace, f"lr_decay_{unit}") or length
    warmup = getattr(namespace, f"lr_warmup_{unit}")
    if length is None or namespace.lr_warmup_fraction is not None or warmup < decay:
        return []
    return [
        f"lr-warmup-{unit}: must be below the {decay} {unit} of the run (--lr-decay-{unit}, or --train-{unit}), got "
        f"lr_warmup_{unit}={warmup}. Pass --lr-warmup-{unit} {decay // 10}."
    ]
