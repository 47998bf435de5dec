"""Every adjustment is still needed: megatron fails or is wrong without it, and is right with it.

tests/helpers/adjustment_effects.py has the proofs; it runs once in an untouched process and once in an adjusted one. A
test here that fails after an upgrade of megatron or torch says that an adjustment can be deleted.
"""

import functools
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import PlatformError
from megatron_hammer.platforms import megatron_compat
from megatron_hammer.platforms.megatron_compat import ADJUSTMENTS, Adjustment
from tests.helpers.repository import ROOT

WAYS_IN = (".metadata", "__0.metadata", "object", "torch.load", "environment")  # of code in a checkpoint's pickles
NAMES = [adjustment.name for adjustment in ADJUSTMENTS]
WITHOUT_FAILS: dict[str, Any] = {
    "no-compiler-import": lambda outcome: outcome is True,
    "cuda-substitution": lambda outcome: len(outcome) == 4 and "ok" not in outcome.values(),
    "allow-no-cuda": lambda outcome: outcome == "AssertionError: Megatron requires CUDA.",
    "cpu-rng-state": lambda outcome: outcome is False,
    "loader-generator": lambda outcome: outcome is False,
    "workers-end-with-rank": lambda outcome: outcome == {"stays up": True, "ends with its rank": False},
    "rng-warning": lambda outcome: outcome == ["CPU RNG state changed within GPU RNG context"],
    "shipped-dataset-helpers": lambda outcome: outcome in ("SystemExit", "FileNotFoundError"),  # no Makefile; no make
    "validation-sets-of-virtual-stages": lambda outcome: outcome[0] == ["prose of stage 0", "code of stage 0"],
    "no-strides": lambda outcome: outcome.startswith("TypeError") and "strides" in outcome,
    "missing-extra-states": lambda outcome: outcome["extra state"] != "ok" and outcome["layers"] is None,
    "other-rates": lambda outcome: outcome == "ValueError",
    "safe-loading": lambda outcome: all(outcome[way][0] for way in WAYS_IN),
    "verified-loading": lambda outcome: set(outcome.values()) == {"ok"},
    "whole-iterations": lambda outcome: (
        outcome["interrupted"] == ["KeyboardInterrupt", ["iter_0000007", "tracker"]]
        and not any(outcome["hashes"].values())
        and outcome["tracker"] == ["", "7"]
    ),
    "results-in-the-process": lambda outcome: outcome == {"process": True, "result": "written"},
    "writer-thread": lambda outcome: outcome == {"writer": "process", "written": [1.0, 1.0, 1.0]},
    "group-step-adam": lambda outcome: outcome == {"step in the group": None, "expects it there": False},
    "exact-gradient-norm": lambda outcome: outcome > 1e-5,  # measured 2.8e-5
    "scale-in-place": lambda outcome: all(value == [[0.5] * 3, ["copy_", "mul"]] for value in outcome.values()),
    "clip-without-waiting": lambda outcome: outcome == {"norm": "float", "clipped": pytest.approx(0.5)},
    "weight-gradient-fusion": lambda outcome: (
        outcome["outcome"] == "AttributeError" and not outcome["is available"] and not outcome["imports"]
    ),
    "triton-rope": lambda outcome: outcome == {"modules": [None, None], "split": False},
    "silu-kernels": lambda outcome: outcome["module"] == "megatron.core.fusions.fused_bias_swiglu",
    "no-gather-of-one-rank": lambda outcome: outcome["gathers in place"],
    "all-to-all-lists": lambda outcome: outcome == ["TypeError", [0.0, 0.0, 0.0]],
}
WITH_WORKS: dict[str, Any] = {
    "no-compiler-import": lambda outcome: outcome is False,
    "cuda-substitution": lambda outcome: set(outcome.values()) == {"ok"},
    "allow-no-cuda": lambda outcome: outcome == "AssertionError: args is not initialized.",
    "cpu-rng-state": lambda outcome: outcome is True,
    "loader-generator": lambda outcome: outcome is True,
    "workers-end-with-rank": lambda outcome: outcome == {"stays up": True, "ends with its rank": True},
    "rng-warning": lambda outcome: outcome == [],
    "shipped-dataset-helpers": lambda outcome: outcome == "ok",
    "validation-sets-of-virtual-stages": lambda outcome: outcome[0] == ["prose of stage 0", "prose of stage 1"],
    "no-strides": lambda outcome: outcome == "ok",
    "missing-extra-states": lambda outcome: (
        outcome["extra state"] == "ok"
        and outcome["layers"] == [{"norm._extra_state": "as built"}]
        and outcome["weight"] == [0.0, 1.0, 2.0]
        and outcome["another object"] != "ok"
    ),
    "other-rates": lambda outcome: outcome == [[0.0, 2.0, 5], [1.0, 2.0, 5]],
    "safe-loading": lambda outcome: (
        all(outcome[way] == [False, "CheckpointError"] for way in WAYS_IN)
        and outcome["values"] == [1, True, [0, 1, 2], 0.5]
    ),
    "verified-loading": lambda outcome: set(outcome.values()) == {"CheckpointError"},
    "whole-iterations": lambda outcome: (
        outcome["interrupted"] == ["KeyboardInterrupt", ["tracker", "unfinished_iter_0000007"]]
        and outcome["finished"] == ["iter_0000007", "tracker"]
        and sorted(name for name, is_right in outcome["hashes"].items() if is_right)
        == [".metadata", "__0_0.distcp", "metadata.json"]
        and outcome["tracker"] == ["6", "7"]
    ),
    "results-in-the-process": lambda outcome: outcome == {"process": False, "result": "written"},
    "writer-thread": lambda outcome: outcome == {"writer": "checkpoint writer", "written": [0.0, 0.0, 0.0]},
    "group-step-adam": lambda outcome: outcome == {"step in the group": 1, "expects it there": True},
    "exact-gradient-norm": lambda outcome: outcome < 1e-7,
    "scale-in-place": lambda outcome: all(value == [[0.5] * 3, []] for value in outcome.values()),
    "clip-without-waiting": lambda outcome: outcome == {"norm": "Tensor", "clipped": pytest.approx(0.5)},
    "weight-gradient-fusion": lambda outcome: (
        outcome == {"outcome": "ok", "main_grad": [6.0] * 3, "is available": True, "imports": True}
    ),
    "triton-rope": lambda outcome: outcome == {"modules": ["megatron_hammer.model.kernels.rope"] * 2, "split": True},
    "silu-kernels": lambda outcome: (
        outcome["module"] == "megatron_hammer.platforms.cpu_arithmetic" and outcome["difference"] < 1e-6
    ),
    "no-gather-of-one-rank": lambda outcome: outcome == {"gathers in place": False, "gathered": [0.0, 1.0, 2.0, 3.0]},
    "all-to-all-lists": lambda outcome: outcome == ["ok", [0.0, 1.0, 2.0]],
}


@functools.cache
def observe(state: str) -> dict[str, Any]:
    """The outcomes in a fresh process that sees no GPU. state: untouched or adjusted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TORCH_COMPILE_DISABLE", None)  # set by this process's own installation
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "adjustment_effects.py"), state]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_adjustment_has_its_proof() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert sorted(NAMES) == sorted(WITHOUT_FAILS) == sorted(WITH_WORKS) == sorted(observe("untouched")["is_needed"])


@pytest.mark.parametrize("name", NAMES)
def test_each_adjustment_is_still_needed(name: str) -> None:
    assert observe("untouched")["is_needed"][name] is True
    assert WITHOUT_FAILS[name](observe("untouched")["observed"][name]), observe("untouched")["observed"][name]


@pytest.mark.parametrize("name", NAMES)
def test_each_adjustment_has_its_effect(name: str) -> None:
    assert WITH_WORKS[name](observe("adjusted")["observed"][name]), observe("adjusted")["observed"][name]


def test_meta_tensors_stay_meta() -> None:
    assert observe("adjusted")["observed"]["meta-device"] == ["meta", "meta"]


@pytest.mark.parametrize("adjustment", ADJUSTMENTS, ids=NAMES)
def test_each_adjustment_names_its_reason_and_upstream_location(adjustment: Adjustment) -> None:
    assert adjustment.platforms
    assert set(adjustment.platforms) <= {"cpu", "cuda"}
    assert len(adjustment.reason) > 30
    assert pkgutil.resolve_name(adjustment.upstream.split()[0])


def test_a_broken_transformer_engine_does_not_end_the_import_of_megatron(tmp_path: Path) -> None:
    """megatron does without it only after an ImportError; a wheel for another CUDA raises others."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    script = (
        "import sys; {}import megatron.core.transformer.transformer_block; print(sys.modules['transformer_engine'])"
    )
    install = "from megatron_hammer.platforms import megatron_compat; megatron_compat.install('cpu'); "
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for prefix, code, output in ((install, 0, "None"), ("", 1, "")):
        command = [sys.executable, "-c", script.format(prefix)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stdout.strip()) == (code, output), result.stderr[-2000:]


@pytest.fixture
def applied(monkeypatch) -> list[str]:
    """The names of the adjustments that are applied, in a process where none is yet; nothing is really changed."""
    applied: list[str] = []
    fakes = tuple(
        Adjustment(
            name=name,
            platforms=platforms,
            backends=("torch",) if name == "d" else ("te", "torch"),
            reason="",
            upstream="",
            apply=functools.partial(applied.append, name),
            is_needed=lambda: True,
        )
        for name, platforms in [("a", ("cpu",)), ("b", ("cpu", "cuda")), ("c", ("cuda",)), ("d", ("cuda",))]
    )
    monkeypatch.setattr(megatron_compat, "ADJUSTMENTS", fakes)
    monkeypatch.setattr(megatron_compat, "_installed", None)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    return applied


@pytest.mark.parametrize(("platform", "names"), [("cpu", ["a", "b"]), ("cuda", ["b", "c", "d"])])
def test_a_platform_gets_its_own_adjustments_once(applied: list[str], platform: str, names: list[str]) -> None:
    megatron_compat.install(platform)
    megatron_compat.install(platform)
    assert applied == names


def test_a_second_platform_is_refused(applied: list[str]) -> None:
    megatron_compat.install("cpu")
    with pytest.raises(PlatformError, match=r"^platform: one .* got cuda and torch after cpu and torch"):
        megatron_compat.install("cuda")
    assert applied == ["a", "b"]


def test_a_second_backend_gets_what_it_has_more_and_is_refused_if_it_has_less(applied: list[str]) -> None:
    megatron_compat.install("cuda", "te")
    assert applied == ["b", "c"]
    megatron_compat.install("cuda", "torch")
    assert applied == ["b", "c", "d"]
    with pytest.raises(PlatformError, match="got cuda and te after cuda and torch"):
        megatron_compat.install("cuda", "te")


def test_another_megatron_is_refused(applied: list[str], monkeypatch) -> None:
    monkeypatch.setattr(megatron_compat, "SUPPORTED_MEGATRON_VERSION", "0.0.7")
    with pytest.raises(
        PlatformError,
        match=r"^megatron-core: must be 0\.0\.7, .* got 0\.19\.2\. Run pip install megatron-core==0\.0\.7\.$",
    ):
        megatron_compat.install("cpu")
    assert applied == []
