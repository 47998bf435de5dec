import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hammer.config.preflight.resume import (
    describe_schedule,
    find_other_groups,
    find_other_training,
    find_schedule_changes,
)
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import TINY, parse

FOLDER = Path("checkpoints/iter_0000010")
RUN = (*TINY, "--train-iters", "20", "--global-batch-size", "8")


def changes(*flags: str, saved: tuple[str, ...] = RUN) -> list[str]:
    before = parse(*saved).plan
    saved_run = SimpleNamespace(directory=FOLDER, schedule=before.schedule, batch=before.batch)
    return find_schedule_changes(parse(*RUN, *flags).plan, saved_run)


def test_a_longer_run_has_another_schedule() -> None:
    assert changes() == []
    (problem,) = changes("--train-iters", "40", "--lr-decay-iters", "20")
    assert_problem(
        problem,
        "override-opt-param-scheduler:",
        "the schedule must be that of the checkpoint",
        f"got samples=320 (was 160) in {FOLDER}",
        "--override-opt-param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
    )
    (problem,) = changes("--train-iters", "40")
    assert "got lr_decay_samples=320 (was 160), samples=320 (was 160) in" in problem
    (problem,) = changes("--lr", "0.002", "--weight-decay", "0.3")
    assert_problem(
        problem, "override-opt-param-scheduler:", "lr=0.002 (was", "start_weight_decay=0.3 (was", "or the old values"
    )


@pytest.mark.parametrize(("before", "now"), [((), ("--decoupled-lr", "0.0009")), (("--decoupled-lr", "0.0009"), ())])
def test_a_decoupled_rate_neither_begins_nor_ends_in_a_run(before: tuple[str, ...], now: tuple[str, ...]) -> None:
    schedule = parse(*RUN, *before).plan.schedule
    saved = SimpleNamespace(directory=FOLDER, schedule=schedule)
    (problem,) = find_other_groups(parse(*RUN, *now, "--override-opt-param-scheduler").plan, saved)
    assert_problem(problem, "decoupled-lr:", f"(was {schedule.decoupled_lr})", "--no-load-optim")
    assert find_other_groups(parse(*RUN, *before).plan, saved) == []
    assert find_other_groups(parse(*RUN, *now, "--no-load-optim").plan, saved) == []
    assert find_other_groups(parse(*RUN, *now, "--finetune").plan, saved) == []


@pytest.mark.parametrize("rate", ["--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr"])
def test_other_rates_are_the_runs_or_refused(rate: str) -> None:
    flags = ("--decoupled-lr", "0.0009", "--decoupled-min-lr", "0.0001")
    saved, run = (*RUN, *flags), (*flags, rate, "0.0002")
    for others in ((), ("--use-checkpoint-opt-param-scheduler",)):
        (problem,) = changes(*run, *others, saved=saved)
        got = f"got {rate[2:].replace('-', '_')}=0.0002 (was"
        assert_problem(problem, "override-opt-param-scheduler:", got, "Pass --override", "or the old values")
    assert changes(*run, "--override-opt-param-scheduler", saved=saved) == []


@pytest.mark.parametrize(
    "flag", ["--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler", "--finetune"]
)
def test_a_schedule_flag_allows_another_schedule(flag: str) -> None:
    assert changes("--train-iters", "40", flag) == []
    assert changes("--no-load-optim", flag) == []


def test_a_schedule_that_begins_again_in_the_middle_of_a_run_must_be_meant() -> None:
    (problem,) = changes("--no-load-optim")
    assert_problem(problem, "no-load-optim:", f"while steps and samples continue from {FOLDER}", "--finetune")


def test_fine_tuning_does_not_continue_pretraining() -> None:
    """Nor the reverse: the step, the optimizer and the schedule are those of other data."""
    runs = {"pretraining": parse(*RUN).plan, "--sft": parse(*RUN, "--sft").plan}
    for before, now in (("pretraining", "--sft"), ("--sft", "pretraining")):
        saved = SimpleNamespace(directory=FOLDER, order=runs[before].order)
        (problem,) = find_other_training(runs[now], saved)
        assert_problem(problem, "load:", f"for one of {before} in {FOLDER}", "--pretrained-checkpoint checkpoints ")
        assert find_other_training(runs[before], saved) == []
        allowed = dataclasses.replace(
            runs[now], checkpoints=dataclasses.replace(runs[now].checkpoints, is_finetuned=True)
        )
        assert find_other_training(allowed, saved) == []


def test_samples_are_counted_like_steps() -> None:
    samples = (*TINY, "--global-batch-size", "8", "--train-samples", "160")
    in_samples, in_steps = parse(*samples).plan, parse(*RUN).plan
    assert describe_schedule(in_samples.schedule, in_samples.batch) == describe_schedule(
        in_steps.schedule, in_steps.batch
    )


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--train-iters", "24", "--lr-decay-iters", "20"),
        ("--lr-warmup-fraction", "0.25"),
        ("--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1", "--end-weight-decay", "0.2"),
    ],
)
def test_the_schedule_is_megatrons(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the scheduler that Megatron builds from the same arguments."""
    arguments = parse(*RUN, *flags)
    namespace, plan = arguments.namespace, arguments.plan
    counted = describe_schedule(plan.schedule, plan.batch)
    from megatron.training import training

    if namespace.weight_decay_incr_style == "constant":  # as validate_args fills it in
        namespace.start_weight_decay = namespace.end_weight_decay = namespace.weight_decay
    built: dict[str, Any] = {}
    monkeypatch.setattr(training, "get_args", lambda: namespace)
    monkeypatch.setattr(training, "OptimizerParamScheduler", lambda optimizer, **options: built.update(options))
    training.get_optimizer_param_scheduler(None)
    names = {"lr": "max_lr", "start_weight_decay": "start_wd", "end_weight_decay": "end_wd", "samples": "wd_incr_steps"}
    names |= {"lr_warmup_samples": "lr_warmup_steps", "lr_decay_samples": "lr_decay_steps"}
    names |= {"weight_decay_incr_style": "wd_incr_style"}
    assert [counted.pop(name) for name in ("decoupled_lr", "decoupled_min_lr")] == [None, None]  # not the scheduler's
    assert counted == {name: built[names.get(name, name)] for name in counted}
