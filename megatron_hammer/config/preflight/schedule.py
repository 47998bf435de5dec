"""Length of the run and learning rate: steps against samples, warm-up against decay."""

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.run_plan import Schedule


def find_schedule_problems(schedule: Schedule) -> list[str]:
    """Steps against samples, warm-up against decay, and the learning rates."""
    if schedule.skips_training:
        return []
    problems = _find_unit_problems(schedule)
    # A length in two units has no comparison with the warm-up.
    if not problems:
        problems += _find_warmup_problems(schedule)
    # OptimizerParamScheduler asserts the order of these rates once the model is built on all ranks.
    if schedule.lr is not None and schedule.min_lr is not None and schedule.min_lr > schedule.lr:
        problems.append(
            f"min-lr: must not be above lr, got min_lr={schedule.min_lr:g}, lr={schedule.lr:g}. "
            f"Pass --min-lr {schedule.lr / 10:g}, or a higher --lr."
        )
    if schedule.lr is not None and schedule.lr_warmup_init > schedule.lr:
        problems.append(
            f"lr-warmup-init: must not be above lr, got lr_warmup_init={schedule.lr_warmup_init:g}, "
            f"lr={schedule.lr:g}. Pass a lower --lr-warmup-init."
        )
    if schedule.lr_decay_style == "WSD" and not (schedule.lr_wsd_decay_iters or schedule.lr_wsd_decay_samples):
        problems.append(
            "lr-wsd-decay-iters: must be given with --lr-decay-style WSD, got lr_wsd_decay_iters=None. "
            "Pass the number of steps at the end over which the learning rate falls."
        )
    elif schedule.lr_decay_style == "WSD" and not problems:
        problems += _find_wsd_problems(schedule)
    return problems


def _find_unit_problems(schedule: Schedule) -> list[str]:
    """A run counts in steps or in samples; Megatron refuses a mixture."""
    if schedule.train_iters is not None and schedule.train_samples is not None:
        return [
            f"train-samples: a run has one length, got train_samples={schedule.train_samples}, "
            f"train_iters={schedule.train_iters}. Pass --train-iters or --train-samples."
        ]
    unit, other = schedule.unit, "iters" if schedule.unit == "samples" else "samples"
    problems = [
        f"{flag_of(name)}: must be counted like the run, got {name}={getattr(schedule, name)} with "
        f"--train-{unit}. Pass --{flag_of(name.replace(other, unit))}."
        for name in (f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}")
        if getattr(schedule, name)
    ]
    if schedule.lr_warmup_fraction is not None and schedule.lr_warmup:
        problems.append(
            f"lr-warmup-fraction: a warm-up has one length, got lr_warmup_fraction={schedule.lr_warmup_fraction:g}, "
            f"lr_warmup_{unit}={schedule.lr_warmup}. Pass --lr-warmup-{unit} 0 with it."
        )
    return problems


def _find_wsd_problems(schedule: Schedule) -> list[str]:
    """A fall that is longer than the run would begin below the peak, without a word from Megatron."""
    unit, length, fall = schedule.unit, schedule.lr_decay, schedule.lr_wsd_decay
    if length is None or fall is None or fall <= length:
        return []
    return [
        f"lr-wsd-decay-{unit}: must be at most the {length} {unit} of the run (--lr-decay-{unit}, or --train-{unit}), "
        f"got lr_wsd_decay_{unit}={fall}. Pass --lr-wsd-decay-{unit} {max(1, length // 10)}."
    ]


def _find_warmup_problems(schedule: Schedule) -> list[str]:
    unit, decay, warmup = schedule.unit, schedule.lr_decay, schedule.lr_warmup
    if schedule.length is None or decay is None or schedule.lr_warmup_fraction is not None or warmup < decay:
        return []
    return [
        f"lr-warmup-{unit}: must be below the {decay} {unit} of the run (--lr-decay-{unit}, or --train-{unit}), got "
        f"lr_warmup_{unit}={warmup}. Pass --lr-warmup-{unit} {decay // 10}."
    ]
