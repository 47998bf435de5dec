"""The tables of idle flags: every row names an attribute that exists, and every row reports its problem."""

import argparse

import pytest

from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.own_flags import add_own_flags
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.preflight.idle_flags import FAMILIES, IDLE, Family
from megatron_hammer.config.preflight.platform import NEEDS_TE
from megatron_hammer.config.run_plan import RunSettings
from tests.helpers.parsed_flags import TINY, parse, with_flags

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
    "fused_residual_rmsnorm": {"backend": "te"},
    "async_save": {"save": None},
}
# What makes the flags of a family work, by the family's first prefix or name; the others never work.
WORKING = {
    "moe_": {"num_experts": 4},
    "fp8_": {"fp8": "hybrid"},
    "fp4_": {"fp4": "e2m1"},
    "megatron_fsdp_": {"use_megatron_fsdp": True},
    "torch_fsdp2_": {"use_torch_fsdp2": True},
    "async_ckpt_": {"async_save": True},
    "tp_comm_": {"tp_comm_overlap": True},
    "muon_": {"optimizer": "muon"},
    "lion_": {"optimizer": "lion"},
    "sgd_": {"optimizer": "sgd"},
    "cuda_graph_": {"cuda_graph_impl": "local"},
    "initial_loss_scale": {"fp16": True},
    "profile_step_start": {"profile": True},
    "qk_clip_": {"qk_clip": True},
    "straggler_": {"log_straggler": True},
    "optimizer_offload_fraction": {"optimizer_cpu_offload": True},
    "decoupled_min_lr": {"decoupled_lr": 1e-4},
    "wandb_entity": {"wandb_project": "p"},
}


def name_family(family: Family) -> str:
    return (*family.prefixes, *family.names)[0]


def list_members(family: Family) -> list[str]:
    members = [name for name in BASE.flags.values if family.prefixes and name.startswith(family.prefixes)]
    return [*members, *family.names]


@pytest.mark.parametrize("name", [*(idle.name for idle in IDLE), *(n for family in FAMILIES for n in family.names)])
def test_attribute_exists(name: str) -> None:
    assert name in BASE.flags.values


NAMES = {*(idle.name for idle in IDLE), *(name for family in FAMILIES for name in list_members(family)), *NEEDS_TE}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_message_names_a_flag_that_exists(name: str, options: set[str]) -> None:
    assert f"--{flag_of(name)}" in options


@pytest.fixture(scope="module")
def options() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    return set(add_own_flags(add_megatron_arguments(parser))._option_string_actions)


@pytest.mark.parametrize("prefix", [prefix for family in FAMILIES for prefix in family.prefixes])
def test_prefix_has_flags(prefix: str) -> None:
    assert [name for name in BASE.flags.values if name.startswith(prefix)]


@pytest.mark.parametrize("idle", {idle.name: idle for idle in reversed(IDLE)}.values(), ids=lambda idle: idle.name)
def test_idle_flag_is_reported_when_typed(idle) -> None:
    settings = with_flags(BASE, idle.name, **CIRCUMSTANCES.get(idle.name, {}))
    flag = flag_of(idle.name)
    problems = [problem for problem in find_flag_problems(settings) if problem.startswith(f"{flag}: has no effect")]
    assert len(problems) == 1
    assert find_flag_problems(with_flags(BASE, **CIRCUMSTANCES.get(idle.name, {}))) == []  # the preset's own are silent


def test_moe_flags_without_experts() -> None:
    (problem,) = find_flag_problems(with_flags(BASE, "moe_router_topk"))
    assert "moe-router-topk: has no effect without experts, got --moe-router-topk typed" in problem


@pytest.mark.parametrize("family", FAMILIES, ids=name_family)
def test_flags_of_a_family_are_reported_until_what_they_need_is_asked_for(family: Family) -> None:
    working = WORKING.get(name_family(family), {})
    names = set(list_members(family)) - {idle.name for idle in IDLE} - set(working)
    assert names
    for name in names:
        flag = flag_of(name)
        (problem,) = list_idle(flag, with_flags(BASE, name))
        assert f"got --{flag} typed" in problem
        if working:
            assert list_idle(flag, with_flags(BASE, name, platform="cuda", backend="te", **working)) == []


def list_idle(flag: str, settings: RunSettings) -> list[str]:
    return [text for text in find_flag_problems(settings) if text.startswith(f"{flag}: has no effect")]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr_decay_iters", {"lr_decay_style": "constant", "lr_warmup_fraction": 0.1}),
        ("ckpt_step", {"load": None, "pretrained_checkpoint": "old"}),
        ("cuda_graph_modules", {"external_cuda_graph": True, "backend": "te", "platform": "cuda"}),
        ("async_save", {"save": "new", "use_persistent_ckpt_worker": True}),
    ],
)
def test_flags_that_work_with_another_are_not_idle(name: str, values: dict[str, object]) -> None:
    assert list_idle(flag_of(name), with_flags(BASE, name, **values)) == []


def test_a_switch_that_is_typed_off_hides_no_idle_flag() -> None:
    settings = with_flags(BASE, "cuda_graph_impl", "cuda_graph_warmup_steps", cuda_graph_impl="none")
    assert len(list_idle("cuda-graph-warmup-steps", settings)) == 1
    assert list_idle("cuda-graph-impl", settings) == []
    settings = with_flags(BASE, "tp_comm_overlap", "tp_comm_overlap_cfg", tp_comm_overlap=False)
    assert len(list_idle("tp-comm-overlap-cfg", settings)) == 1
    assert list_idle("tp-comm-overlap", settings) == []


def test_async_save_without_a_worker_would_be_synchronous() -> None:
    (problem,) = list_idle("async-save", with_flags(BASE, "async_save", save="new", async_save=True))
    assert "without --use-persistent-ckpt-worker" in problem


def test_a_number_format_without_its_flag_is_not_trained_silently() -> None:
    (problem,) = list_idle("fp8-recipe", with_flags(BASE, "fp8_recipe"))
    assert "without --fp8-format" in problem
    assert "Pass --fp8-format hybrid" in problem
