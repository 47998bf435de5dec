import copy
import os
import sys

import pytest
import torch

from megatron_hammer.config import megatron_checks
from megatron_hammer.config.megatron_checks import (
    build_trial_config,
    describe_refusal,
    find_megatron_refusal,
    read_megatron_defaults,
)
from megatron_hammer.config.preflight.find_problems import find_problems
from megatron_hammer.errors import ConfigError
from tests.helpers.parsed_flags import TINY, parse


def test_the_checks_change_no_argument(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = parse(*TINY, "--deterministic-mode")  # sets variables of the environment while it validates
    before, environment = copy.deepcopy(vars(arguments.namespace)), dict(os.environ)
    assert find_problems(arguments) == []
    assert vars(arguments.namespace) == before
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")


def test_a_refusal_keeps_megatrons_own_words() -> None:
    assert find_megatron_refusal(parse(*TINY).namespace) is None
    refusal = find_megatron_refusal(parse(*TINY, "--moe-grouped-gemm", "--qk-clip").namespace)
    assert refusal == "--qk-clip is only supported with TE >= 2.9.0"
    with pytest.raises(ConfigError, match="megatron: refuses this configuration: --qk-clip is only"):
        build_trial_config(parse(*TINY, "--qk-clip").namespace)
    assert describe_refusal("x").endswith("Change or drop the flag it names.")


def test_a_plan_for_te_is_checked_without_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """What megatron says about TransformerEngine's absence here is no answer; everything else is."""
    monkeypatch.setattr(megatron_checks, "find_te_failure", lambda: "No module named 'transformer_engine'")
    plan = parse(*TINY, "--qk-clip", platform="cuda", backend="te").namespace
    assert plan.transformer_impl == "transformer_engine"
    assert find_megatron_refusal(plan) is None  # only supported with TE >= 2.9.0
    plan.qk_clip, plan.recompute_granularity = False, "full"
    assert "recompute_method" in str(find_megatron_refusal(plan))


def test_a_question_about_the_planned_gpu_is_no_consent_to_the_rest() -> None:
    """--moe-grouped-gemm asks for the GPU's compute capability; what follows is still checked."""
    flags = (*TINY, "--num-experts", "4", "--moe-grouped-gemm", "--dry-run", "--world-size", "4")
    plan = parse(*flags, platform="cuda", backend="te").namespace
    assert find_megatron_refusal(plan) is None
    plan.main_grads_dtype = "bf16"  # of the optimizer's configuration, which is built last
    assert "main_grads_dtype can only be fp32" in str(find_megatron_refusal(plan))


@pytest.mark.parametrize(
    "flags",
    [
        "--use-precision-aware-optimizer",
        "--num-experts 4 --moe-permute-fusion --moe-token-dispatcher-type alltoall",
    ],
)
def test_a_plan_for_te_has_the_parts_of_te_that_megatron_looks_for(flags: str) -> None:
    plan = (*TINY, *flags.split(), "--precision", "bf16", "--dry-run", "--world-size", "4")
    assert find_megatron_refusal(parse(*plan, platform="cuda", backend="te").namespace) is None
    assert "transformer_engine" not in sys.modules


def test_deterministic_mode_ends_with_the_check() -> None:
    assert find_megatron_refusal(parse(*TINY, "--deterministic-mode").namespace) is None
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_environment_of_a_login_node_is_not_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    flags = (*TINY, "--tensor-model-parallel-size", "2", "--dry-run", "--world-size", "8")
    assert find_megatron_refusal(parse(*flags, platform="cuda").namespace) is None
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_tensor_parallelism_is_planned_with_the_environment_that_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    flags = (*TINY, "--tensor-model-parallel-size", "2", "--dry-run", "--world-size", "8")
    assert find_megatron_refusal(parse(*flags, platform="cuda").namespace) is None
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_defaults_are_megatrons() -> None:
    defaults = read_megatron_defaults()
    assert (defaults["lr_decay_style"], defaults["num_layers"], defaults["swiglu"]) == ("linear", None, False)
    assert "preset" not in defaults
