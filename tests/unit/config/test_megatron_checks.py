import copy
import os

import pytest

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


def test_defaults_are_megatrons() -> None:
    defaults = read_megatron_defaults()
    assert (defaults["lr_decay_style"], defaults["num_layers"], defaults["swiglu"]) == ("linear", None, False)
    assert "preset" not in defaults
