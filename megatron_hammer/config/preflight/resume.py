"""Whether the learning rate and the weight decay of a resumed run are scheduled as in its checkpoint.

Megatron asserts it once the checkpoint is loaded on all ranks; a longer run always has another schedule, since the
weight decay's is as long as the run.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_hammer.config.samples import select_global_batch_size


def find_schedule_changes(namespace: argparse.Namespace, saved: argparse.Namespace, checkpoint_dir: Path) -> list[str]:
    """One problem with everything that differs, unless a flag says whose schedule counts or none is loaded."""
    is_settled = namespace.override_opt_param_scheduler or namespace.use_checkpoint_opt_param_scheduler
    is_loaded = not (namespace.finetune or namespace.no_load_optim or namespace.skip_train)
    if is_settled or not is_loaded or None in (namespace.lr, namespace.micro_batch_size):
        return []
    try:
        before, now = describe_schedule(saved), describe_schedule(namespace)
    except (AttributeError, TypeError):  # saved by another version of Megatron, which had other arguments
        return []
    changes = ", ".join(f"{name}={now[name]} (was {before[name]})" for name in now if now[name] != before[name])
    if not changes:
        return []
    return [
        f"override-opt-param-scheduler: the schedule must be that of the checkpoint, got {changes} "
        f"in {checkpoint_dir}. Pass --override-opt-param-scheduler to go on with the new one, "
        "or --use-checkpoint-opt-param-scheduler to keep the old one."
    ]


def describe_schedule(args: argparse.Namespace) -> dict[str, Any]:
    """What OptimizerParamScheduler compares, lengths in samples, by the flags that set it.

    Source: megatron.training.training.get_optimizer_param_scheduler, OptimizerParamScheduler.load_state_dict.
    """
    if args.train_samples:
        length, decay, warmup = args.train_samples, args.lr_decay_samples, args.lr_warmup_samples
    else:
        batch = select_global_batch_size(args)
        length, warmup = args.train_iters * batch, args.lr_warmup_iters * batch
        decay = args.lr_decay_iters * batch if args.lr_decay_iters else None
    decay = decay or length
    is_constant = args.weight_decay_incr_style == "constant"
    return {
        "lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_samples": warmup if args.lr_warmup_fraction is None else args.lr_warmup_fraction * decay,
        "lr_decay_samples": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_weight_decay": args.weight_decay if is_constant else args.start_weight_decay,
        "end_weight_decay": args.weight_decay if is_constant else args.end_weight_decay,
        "samples": length,
        "weight_decay_incr_style": args.weight_decay_incr_style,
    }
