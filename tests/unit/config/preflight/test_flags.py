"""The tables of flags: every row names an attribute that exists, and every row reports its problem."""

import pytest

from megatron_hammer.config.flag_tables.refused import UNCOUNTED
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.values import COUNTS, RANGES
from tests.helpers.parsed_flags import TINY, find, parse

BASE = parse(*TINY).settings


@pytest.mark.parametrize("name", [*COUNTS, *RANGES])
def test_attribute_exists(name: str) -> None:
    assert name in BASE.flags.values


@pytest.mark.parametrize("name", UNCOUNTED)
def test_uncounted_attribute_exists_and_is_off_by_default(name: str) -> None:
    assert BASE.flags[name] in UNCOUNTED[name]


def test_a_good_command_line_has_no_problems() -> None:
    assert find_flag_problems(BASE) == []


def test_an_empty_text_is_not_taken_for_an_absent_flag() -> None:
    """Of an unset variable of the shell: Megatron would train and save nothing."""
    problems = find(*TINY, "--save", "", "--tensorboard-dir=", "--wandb-project", "")
    empty = [problem.partition(":")[0] for problem in problems if "must not be empty" in problem]
    assert empty == ["save", "tensorboard-dir"]


def test_rope_scaling_reaches_the_model() -> None:
    """gpt_config_from_args hands over use_rope_scaling but not the factor, for which megatron then has 8."""
    import inspect

    from megatron.training.argument_utils import gpt_config_from_args

    assert "rope_scaling_factor" not in inspect.getsource(gpt_config_from_args)  # else ours need not
    assert find(*TINY, "--use-rope-scaling", "--rope-scaling-factor", "4") == []


def test_the_upstream_reason_for_the_batch_ramp_is_still_there() -> None:
    import inspect

    from megatron.training import global_vars

    assert "rampup_batch_size" not in inspect.getsource(global_vars)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--recompute-granularity full", "recompute-granularity: full needs a method and a number of layers"),
        (
            "--iterations-to-skip 3 --num-virtual-stages-per-pipeline-rank 2",
            "iterations-to-skip: Megatron reads the batches of skipped steps on every stage",
        ),
        (
            "--on-bad-loss roll-back",
            "on-bad-loss: roll-back needs checkpoints to go back to, got on_bad_loss=roll-back, save=None",
        ),
        (
            "--fingerprint-interval 2",
            "fingerprint-interval: needs a folder, got fingerprint_interval=2, metrics_path=None",
        ),
        (
            "--wandb-project p --tensorboard-dir logs --save new",
            "wandb-exp-name: must be given with --wandb-project, got wandb_exp_name=None",
        ),
        ("--bf16 --precision fp32", "precision: a run has one precision, got precision=fp32, --bf16. Drop --bf16."),
        ("--distributed-backend nccl", "distributed-backend: does not work on the cpu platform"),
        ("--world-size 8", "world-size: has no effect without --dry-run"),
    ],
)
def test_flags_that_need_another_flag(flags: str, match: str) -> None:
    problems = find(*TINY, *flags.split())
    assert any(match in problem for problem in problems)


def test_grouped_queries_without_a_number_of_groups() -> None:
    (problem,) = find("--preset", "llama2-7b", "--mock-data", "--dry-run", "--group-query-attention")
    assert "num-query-groups: must be given with --group-query-attention, got num_query_groups=32 by default" in problem
