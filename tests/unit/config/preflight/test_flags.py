"""The tables of flags: every row names an attribute that exists, and every row reports its problem."""

import pytest

from megatron_hammer.config.preflight.flags import IDLE, NEEDS_TE, UNCOUNTED, find_flag_problems
from megatron_hammer.config.values import COUNTS, RANGES
from megatron_hammer.platforms import cpu
from tests.helpers.parsed_flags import TINY, find, parse, with_flags

BASE = parse(*TINY).settings
# What makes a row of IDLE idle, beyond the tiny preset on the torch backend, which suffices for the others.
CIRCUMSTANCES = {
    "num_query_groups": {"group_query_attention": False},
    "rotary_base": {"position_embedding_type": "learned_absolute"},
    "rotary_percent": {"position_embedding_type": "learned_absolute"},
    "rotary_interleaved": {"position_embedding_type": "learned_absolute"},
    "rotary_seq_len_interpolation_factor": {"position_embedding_type": "learned_absolute"},
    "use_rope_scaling": {"position_embedding_type": "learned_absolute"},
    "min_lr": {"lr_decay_style": "constant"},
    "lr_decay_iters": {"lr_decay_style": "constant"},
    "eval_interval": {"eval_iters": 0},
    "reset_attention_mask": {"backend": "te"},
}


@pytest.mark.parametrize("name", [*(idle.name for idle in IDLE), *NEEDS_TE, *COUNTS, *RANGES])
def test_attribute_exists(name: str) -> None:
    assert name in BASE.flags.values


@pytest.mark.parametrize("name", UNCOUNTED)
def test_uncounted_attribute_exists_and_is_off_by_default(name: str) -> None:
    assert BASE.flags[name] in UNCOUNTED[name]


@pytest.mark.parametrize("name", [row[0] for row in cpu.UNSUPPORTED])
def test_platform_attribute_exists(name: str) -> None:
    assert name in BASE.flags.values


def test_a_good_command_line_has_no_problems() -> None:
    assert find_flag_problems(BASE) == []


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: idle.name)
def test_idle_flag_is_reported_when_typed(idle) -> None:
    settings = with_flags(BASE, idle.name, **CIRCUMSTANCES.get(idle.name, {}))
    flag = "world-size" if idle.name == "requested_world_size" else idle.name.replace("_", "-")
    problems = [problem for problem in find_flag_problems(settings) if problem.startswith(f"{flag}: has no effect")]
    assert len(problems) == 1
    assert find_flag_problems(with_flags(BASE, **CIRCUMSTANCES.get(idle.name, {}))) == []  # the preset's own are silent


@pytest.mark.parametrize("name", NEEDS_TE)
def test_flags_that_need_transformer_engine_are_refused_without_it(name: str) -> None:
    on_gpu = with_flags(BASE, platform="cuda", **{name: "hybrid"})
    (problem,) = find_flag_problems(on_gpu)
    assert "needs the te backend (TransformerEngine), got" in problem
    assert find_flag_problems(with_flags(BASE, platform="cuda", backend="te", **{name: "hybrid"})) == []


def test_context_parallelism_needs_transformer_engine() -> None:
    (problem,) = find_flag_problems(with_flags(BASE, platform="cuda", context_parallel_size=2))
    assert "context-parallel-size: needs the te backend" in problem


def test_moe_flags_without_experts() -> None:
    (problem,) = find_flag_problems(with_flags(BASE, "moe_router_topk"))
    assert "moe-router-topk: has no effect without experts, got --moe-router-topk typed" in problem


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
        ("--wandb-project p", "wandb-exp-name: must be given with --wandb-project, got wandb_exp_name=None"),
        ("--bf16 --precision fp32", "precision: a run has one precision, got precision=fp32, --bf16. Drop --bf16."),
        ("--distributed-backend nccl", "distributed-backend: does not work on the cpu platform"),
        ("--padded-vocab-size 5000", "padded-vocab-size: follows from --vocab-size"),
        ("--world-size 8", "world-size: has no effect without --dry-run"),
    ],
)
def test_flags_that_need_another_flag(flags: str, match: str) -> None:
    problems = find(*TINY, *flags.split())
    assert match in problems[0]


def test_grouped_queries_without_a_number_of_groups() -> None:
    (problem,) = find("--preset", "llama2-7b", "--mock-data", "--dry-run", "--group-query-attention")
    assert "num-query-groups: must be given with --group-query-attention, got num_query_groups=32 by default" in problem


@pytest.mark.parametrize(
    ("generation", "value", "num_problems"), [(9, None, 1), (9, "1", 0), (10, None, 0), (None, None, 0)]
)
def test_environment_of_older_gpus(
    monkeypatch: pytest.MonkeyPatch, generation: int | None, value: str | None, num_problems: int
) -> None:
    from megatron_hammer.config.preflight import flags as preflight_flags

    monkeypatch.setattr(preflight_flags, "read_device_generation", lambda: generation)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
    problems = find_flag_problems(with_flags(BASE, platform="cuda", tensor_model_parallel_size=2))
    assert len(problems) == num_problems
    if problems:
        assert "CUDA_DEVICE_MAX_CONNECTIONS: must be 1 with tensor or context parallelism on this GPU" in problems[0]
