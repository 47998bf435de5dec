"""The platform and the backend are chosen automatically; a request that cannot be met is refused with a remedy."""

import sys
import types

import pytest
import torch

from megatron_hammer.errors import PlatformError
from megatron_hammer.platforms import select
from megatron_hammer.platforms.select import select_backend, select_platform

NAMES_OF_2_13 = ("multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale")
NAMES_OF_2_14 = (*NAMES_OF_2_13, "multi_tensor_scale_tensor")


@pytest.fixture
def pretend(monkeypatch):
    """pretend(gpu=..., te_error=..., te_names=...): a machine with or without a GPU, how importing TransformerEngine
    ends, and what its optimizers have.
    """

    def set_machine(
        *, gpu: bool = False, te_error: Exception | None = None, te_names: tuple[str, ...] = NAMES_OF_2_14
    ) -> None:
        def import_te(name: str) -> types.SimpleNamespace:
            # what megatron imports
            assert name in ("transformer_engine.pytorch.fp8", "transformer_engine.pytorch.optimizers")
            if te_error is not None:
                raise te_error
            return types.SimpleNamespace(**dict.fromkeys(te_names))

        # find_te_failure writes here; the fixture restores it.
        monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
        monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(select.importlib, "import_module", import_te)

    return set_machine


@pytest.mark.parametrize(
    ("requested", "gpu", "platform"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu")],
)
def test_platform(pretend, requested: str, gpu: bool, platform: str) -> None:
    pretend(gpu=gpu)
    assert select_platform(requested) == platform


def test_cuda_without_a_gpu_is_refused(pretend) -> None:
    pretend(gpu=False)
    with pytest.raises(PlatformError, match=r"^platform: cuda needs a GPU .* got none .* or pass --platform cpu\.$"):
        select_platform("cuda")


MISSING = ModuleNotFoundError("No module named 'transformer_engine'")
BROKEN = OSError("libcudart.so.13: cannot open shared object file")
MISMATCH = AssertionError("Transformer Engine package version mismatch")
EVERY_BROKEN = [BROKEN, MISMATCH, RuntimeError("Found empty `transformer-engine` meta package"), ValueError("odd")]


@pytest.mark.parametrize(
    ("requested", "platform", "te_error", "backend"),
    [
        ("auto", "cpu", None, "torch"),
        ("auto", "cuda", MISSING, "torch"),
        ("auto", "cuda", BROKEN, "torch"),
        ("auto", "cuda", MISMATCH, "torch"),
        ("torch", "cuda", MISMATCH, "torch"),
        ("auto", "cuda", None, "te"),
        ("te", "cuda", None, "te"),
        ("torch", "cuda", None, "torch"),
        ("torch", "cpu", MISSING, "torch"),
    ],
)
def test_backend(pretend, requested: str, platform: str, te_error: Exception | None, backend: str) -> None:
    pretend(te_error=te_error)
    assert select_backend(requested, platform=platform) == backend


def test_a_plan_for_a_cluster_has_te_there(pretend) -> None:
    pretend(te_error=MISSING)
    elsewhere = {"platform": "cuda", "is_plan": True, "is_for_this_machine": False}
    assert select_backend("te", **elsewhere) == "te"
    assert select_backend("auto", **elsewhere) == "torch"
    for changed in ({"is_plan": False}, {"is_for_this_machine": True}):
        with pytest.raises(
            PlatformError, match=r"^backend: te needs TransformerEngine 2\.14 or later, which does not work here: "
        ):
            select_backend("te", **elsewhere | changed)


def test_te_on_cpu_is_refused(pretend) -> None:
    pretend()
    with pytest.raises(PlatformError, match=r"^backend: te needs a GPU, got platform=cpu\. Pass --backend torch"):
        select_backend("te", platform="cpu")


@pytest.mark.parametrize("te_error", [MISSING, *EVERY_BROKEN], ids=lambda error: type(error).__name__)
def test_te_that_does_not_import_is_refused_with_the_cause(pretend, te_error: Exception) -> None:
    pretend(te_error=te_error)
    with pytest.raises(PlatformError) as refusal:
        select_backend("te", platform="cuda")
    assert refusal.match(r"^backend: te needs TransformerEngine 2\.14 or later, which does not work here: ")
    assert refusal.match(r"\. Run pip install 'transformer-engine\[pytorch\]>=2\.14', or pass --backend torch")
    assert str(te_error) in str(refusal.value)


def test_te_before_2_14_is_refused_and_not_chosen(pretend) -> None:
    pretend(te_names=NAMES_OF_2_13)
    assert select_backend("auto", platform="cuda") == "torch"
    with pytest.raises(
        PlatformError, match=r"which does not work here: .*older than 2\.14 \(multi_tensor_scale_tensor"
    ):
        select_backend("te", platform="cuda")


@pytest.mark.parametrize("te_error", EVERY_BROKEN, ids=lambda error: type(error).__name__)
def test_a_broken_te_is_hidden(pretend, te_error: Exception) -> None:
    pretend(te_error=te_error)
    select.find_te_failure()
    with pytest.raises(ImportError):  # the only exception for which megatron does without
        exec("import transformer_engine.pytorch")


def test_a_missing_or_a_working_te_is_not_hidden(pretend) -> None:
    for te_error in (MISSING, None):
        pretend(te_error=te_error)
        select.find_te_failure()
        assert sys.modules["transformer_engine"] is not None
