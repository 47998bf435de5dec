import dataclasses
from types import SimpleNamespace

import pytest

from megatron_hammer.errors import ConfigError
from tests.helpers.parsed_flags import TINY, parse

MODEL = (
    *("--mock-data", "--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "100"),
    *("--max-position-embeddings", "32", "--lr", "1e-3", "--train-iters", "5"),
)
BATCH = ("--seq-length", "32", "--micro-batch-size", "2")


@pytest.mark.parametrize("left_out", [0, 2])
def test_there_is_no_plan_without_a_batch_but_a_model_to_look_at(left_out: int) -> None:
    given = BATCH[:left_out] + BATCH[left_out + 2 :]
    arguments = parse(*MODEL, *given)
    assert arguments.plan is None
    assert arguments.settings.model is not None
    assert arguments.settings.layout is not None
    with pytest.raises(ConfigError, match=f"{BATCH[left_out][2:]}: must be given"):
        arguments.require_plan()
    assert parse(*MODEL, *BATCH).require_plan().seq_length == 32


@pytest.mark.parametrize("flags", [(*MODEL[3:], *BATCH), (*MODEL, *BATCH, "--tensor-model-parallel-size", "0")])
def test_there_is_no_model_without_an_essential_or_with_a_senseless_value(flags: tuple[str, ...]) -> None:
    arguments = parse(*flags)
    assert (arguments.plan, arguments.settings.model, arguments.settings.layout) == (None, None, None)


def test_a_plan_keeps_what_was_typed_whatever_megatron_makes_of_its_arguments() -> None:
    arguments = parse(*TINY)
    plan = arguments.require_plan()
    arguments.namespace.seq_length = 1
    assert (plan.seq_length, plan.flags["seq_length"]) == (256, 256)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seq_length = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.flags.values["seq_length"] = 1  # type: ignore[index]


def test_steps_of_a_run_in_samples_are_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last batch that is not full is not trained."""
    plan = parse(*TINY, "--train-samples", "807").require_plan()
    from megatron.training import training

    monkeypatch.setattr(training, "print_rank_0", lambda message: None)
    args = SimpleNamespace(train_iters=None, train_samples=807, global_batch_size=8, step_batch_size_schedule=None)
    training.update_train_iters(args)
    assert plan.num_steps == args.train_iters == 100
    assert plan.num_samples["train"] == 807


def test_micro_batches_of_a_step() -> None:
    flags = (*TINY, "--dry-run", "--world-size", "4", "--tensor-model-parallel-size", "2")
    plan = parse(*flags, "--global-batch-size", "12").require_plan()
    assert (plan.batch.micro_batch_size, plan.layout.data_parallel_size, plan.num_microbatches) == (2, 2, 3)


def test_where_a_resumed_run_ends() -> None:
    """8 samples to a step; evaluations of 2 x 8 samples every fourth step and at the end."""
    plan = parse(*TINY, "--train-iters", "12", "--eval-iters", "2", "--eval-interval", "4").require_plan()
    assert plan.count_last_sample(0, 0) == 96
    assert plan.count_last_sample(6, 24) == 24 + 6 * 8, "the first six steps had batches of 4"
    assert plan.count_last_validation_sample(8, 32) == 32 + 2 * 16
    assert plan.num_samples["valid"] == 4 * 16
