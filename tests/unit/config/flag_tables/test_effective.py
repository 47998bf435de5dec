"""Every flag of the installed Megatron, and every flag of ours, is in one class, and preflight answers as it says."""

import argparse
import enum
import importlib.util
import signal
from typing import Any

import pytest

from megatron_hammer.config.flag_tables.effective import EFFECTIVE
from megatron_hammer.config.flag_tables.refused import ALWAYS_REFUSED, REFUSED
from megatron_hammer.config.flag_tables.row import always
from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.own_flags import add_own_flags
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.preflight.idle_flags import IDLE, find_idle_problems, list_rows
from tests.helpers.parsed_flags import TINY, parse, with_flags

BASE = parse(*TINY).settings
KNOWN = EFFECTIVE | REFUSED
GPU = {"platform": "cuda", "distributed_backend": "nccl"}
SWITCHES = """
adlr_autoresume async_save bf16 ckpt_fully_parallel_load dataloader_fast_cache_load defer_embedding_wgrad_compute
dry_run enable_ft_package fine_grained_activation_offloading fp4 fp8 log_straggler manual_gc moe_paged_stash
moe_router_enable_expert_bias multiple_validation_sets nccl_ub optimizer_cpu_offload overlap_grad_reduce
overlap_moe_expert_parallel_comm overlap_param_gather profile qk_clip qk_layernorm record_memory_history replication
sequence_parallel sft tp_comm_overlap use_mup use_persistent_ckpt_worker use_precision_aware_optimizer
use_pytorch_profiler use_rope_scaling use_sharp
"""
# Two runs, of which one or the other has what a flag needs beside it. Together with BASE, whose flags are few.
FULL = {
    **GPU,
    **dict.fromkeys(SWITCHES.split(), True),
    "backend": "te",
    "save": "new",
    "load": "new",
    "keep_last": 3,
    "evaluate_every": 10,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
    "num_virtual_stages_per_pipeline_rank": 2,
    "cp_comm_type": ["a2a+p2p"],
    "num_experts": 4,
    "moe_shared_expert_intermediate_size": 8,
    "moe_expert_capacity_factor": 2.0,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_routing_trace_path": "traces",
    "moe_token_dispatcher_type": "flex",
    "window_size": (8, 0),
    "position_embedding_type": "yarn",
    "lr_decay_style": "WSD",
    "train_samples": 100,
    "weight_decay_incr_style": "linear",
    "decoupled_lr": 1e-4,
    "optimizer": "muon",
    "recompute_granularity": "full",
    "cpu_offloading_num_layers": 1,
    "cuda_graph_impl": "local",
    "dataloader_type": "cyclic",
    "mock_data": False,
    "non_persistent_ckpt_type": "global",
    "tokenizer_type": "HuggingFaceTokenizer",
    "tensorboard_dir": "logs",
    "wandb_project": "p",
    "wandb_exp_name": "e",
    "timing_log_level": 2,
    "logits_save_dir": "logits",
    "ckpt_convert_format": "torch",
    "error_injection_rate": 5,
    "fault_injector_ranks": "0",
    "on_bad_loss": "roll-back",
    "flight_recorder_dump_path": "flights",
}
OTHER = {
    **GPU,
    "backend": "torch",
    "fp16": True,
    "bf16": False,
    "swiglu": False,
    "use_megatron_fsdp": True,
    "use_torch_fsdp2": True,
    "optimizer": "sgd",
    "recompute_granularity": "selective",
    "tokenizer_type": "TikTokenizer",
    "non_persistent_ckpt_type": "local",
    "load": "new",
    "profile": True,
}
CHANGED_SWIGLU = {"bias_swiglu_fusion": False, "optimizer": "lion", "eval_iters": 0, "lr_decay_style": "constant"}
PLAIN = {
    **CHANGED_SWIGLU,
    "swiglu": True,
    "backend": "te",
    "group_query_attention": False,
    "position_embedding_type": "learned_absolute",
    "lr_warmup_iters": 0,
    "exit_signal_handler": False,
    "use_distributed_optimizer": False,
    "tokenizer_type": "SentencePieceTokenizer",
}
CIRCUMSTANCES = (FULL, OTHER, CHANGED_SWIGLU, PLAIN)
# Values of effective flags that are not made by _change, each with what it needs.
CHANGED: dict[str, dict[str, Any]] = {
    "group_query_attention": {"group_query_attention": True, "num_query_groups": 4},
    "num_attention_heads": {"num_attention_heads": 8, "kv_channels": 32},
    "softmax_type": {"softmax_type": "off-by-one"},
    "position_embedding_type": {"position_embedding_type": "none"},
    "optimizer": {"optimizer": "sgd", "use_distributed_optimizer": False},
    "distributed_backend": {"platform": "cuda"},
    "ckpt_format": {"ckpt_format": "torch_dcp"},
    "dataloader_type": {"dataloader_type": "cyclic"},
    "recompute_granularity": {"recompute_granularity": "selective"},
    "init_model_with_meta_device": {"init_model_with_meta_device": True, "use_megatron_fsdp": True},
    "dataloader_fast_cache_load": {"dataloader_fast_cache_load": True, "data_cache_path": "cache"},
    "phase_transition_iterations": {"phase_transition_iterations": [1], "train_samples": 100},
    "profile": {"profile": True, "use_pytorch_profiler": True, "tensorboard_dir": "logs"},
    "wandb_project": {"wandb_project": "p", "wandb_exp_name": "e", "tensorboard_dir": "logs", "save": "new"},
    "te_precision_config_file": {"te_precision_config_file": __file__},
    "precision": {"precision": "bf16"},
    "sft": {"sft": True, "mock_data": False},
    "fingerprint_interval": {"fingerprint_interval": 2, "metrics_path": "metrics.jsonl"},
    "platform": {"platform": "cuda"},
    "backend": {"backend": "te"},
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_own_flags(add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False)))


@pytest.fixture(scope="module")
def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions}


def list_full_names() -> set[str]:
    return {name for row in IDLE for name in row.names if not name.endswith("_")}


def test_every_flag_is_in_one_class(actions: dict[str, argparse.Action]) -> None:
    assert len(actions) > 800
    assert [name for name in actions if name not in KNOWN and not list_rows(name, KNOWN)] == []
    assert EFFECTIVE & list_full_names() == set()
    assert REFUSED & list_full_names() == set()
    assert EFFECTIVE & set(ALWAYS_REFUSED) == set()


def test_every_name_of_a_table_is_a_flag(actions: dict[str, argparse.Action]) -> None:
    assert sorted((KNOWN | list_full_names()) - set(actions)) == []
    beginnings = {name for row in IDLE for name in row.names if name.endswith("_")}
    assert [
        beginning for beginning in sorted(beginnings) if not any(name.startswith(beginning) for name in actions)
    ] == []


def test_a_message_names_a_flag_that_exists(parser: argparse.ArgumentParser) -> None:
    options = parser._option_string_actions
    names = {action.dest for action in parser._actions}
    wrong = [name for name in names if getattr(options.get(f"--{flag_of(name)}"), "dest", None) != name]
    assert sorted(wrong) == []


def test_a_flag_of_another_version_is_refused_until_it_is_classified() -> None:
    (problem,) = find_flag_problems(with_flags(BASE, "of_a_later_version"))
    assert "of-a-later-version: is not known to have an effect" in problem


def test_every_idle_flag_is_reported_and_works_somewhere(
    actions: dict[str, argparse.Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported in some circumstances and not in others, unless a row says never: then in all."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = sorted(set(actions) - KNOWN)
    alone = {name: _is_reported(name, {}, actions[name]) for name in names}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    wrong = {}
    for name in names:
        answers = [alone[name], *(_is_reported(name, values, actions[name]) for values in CIRCUMSTANCES)]
        is_never = any(row.is_idle is always for row in list_rows(name, KNOWN))
        if not any(answers) or all(answers) != is_never:
            wrong[name] = answers
    assert wrong == {}


def _is_reported(name: str, values: dict[str, Any], action: argparse.Action) -> bool:
    flags = with_flags(BASE, name, **{name: _change(action), **values}).flags
    return any(problem.startswith(f"{flag_of(name)}: has no effect") for problem in find_idle_problems(flags, REFUSED))


def test_every_refused_flag_is_refused_wherever_it_is_set(actions: dict[str, argparse.Action]) -> None:
    for name in sorted(REFUSED):
        for values in ({}, {**GPU, "backend": "te"}, {**GPU, "backend": "torch"}):
            problems = find_flag_problems(with_flags(BASE, name, **values, **{name: _change(actions[name])}))
            assert any(problem.startswith(f"{flag_of(name)}: ") for problem in problems), name


def test_every_effective_flag_is_taken_somewhere(
    actions: dict[str, argparse.Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another value than its default, and every package there: on a GPU with one backend, or on the CPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    places = ({}, {**GPU, "backend": "te"}, {**GPU, "backend": "torch"})
    refused = {}
    for name in sorted(EFFECTIVE):
        changed = CHANGED.get(name, {name: _change(actions[name])})
        answers = [find_flag_problems(with_flags(BASE, *changed, **{**place, **changed})) for place in places]
        if all(answers):
            refused[name] = answers
    assert refused == {}


def _change(action: argparse.Action) -> Any:
    """A value that the flag can have and that is not its default."""
    default = BASE.flags.values.get(action.dest, action.default)
    if isinstance(default, signal.Signals):
        return signal.SIGUSR1
    if isinstance(default, bool) or action.nargs == 0:
        return not default
    if action.choices:
        return next(choice for choice in action.choices if choice != default)
    if isinstance(default, enum.Enum):
        return next(member for member in type(default) if member != default)
    if isinstance(default, (int, float)):
        return default + 1
    return ["2"] if action.nargs in ("*", "+") else 2 if action.type in (int, float) else "other"
