"""The platform and the backend are chosen automatically; a request that cannot be met is refused with a remedy."""

import pytest
import torch

from megatron_hammer.errors import PlatformError
from megatron_hammer.platforms import select
from megatron_hammer.platforms.select import select_backend, select_platform


@pytest.fixture
def pretend(monkeypatch):
    """pretend(gpu=..., te_error=...): a machine with or without a GPU, and how importing TransformerEngine ends."""

    def set_machine(*, gpu: bool = False, te_error: Exception | None = None) -> None:
        def import_te(name: str) -> None:
            assert name == "transformer_engine.pytorch.fp8"  # what megatron imports
            if te_error is not None:
                raise te_error

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


@pytest.mark.parametrize(
    ("requested", "platform", "te_error", "backend"),
    [
        ("auto", "cpu", None, "torch"),
        ("auto", "cuda", MISSING, "torch"),
        ("auto", "cuda", BROKEN, "torch"),
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
        with pytest.raises(PlatformError, match=r"^backend: te needs TransformerEngine, which does not import: "):
            select_backend("te", **elsewhere | changed)


def test_te_on_cpu_is_refused(pretend) -> None:
    pretend()
    with pytest.raises(PlatformError, match=r"^backend: te needs a GPU, got platform=cpu\. Pass --backend torch"):
        select_backend("te", platform="cpu")


@pytest.mark.parametrize("te_error", [MISSING, BROKEN], ids=["missing", "broken"])
def test_te_that_does_not_import_is_refused_with_the_cause(pretend, te_error: Exception) -> None:
    pretend(te_error=te_error)
    with pytest.raises(PlatformError) as refusal:
        select_backend("te", platform="cuda")
    assert refusal.match(r"^backend: te needs TransformerEngine, which does not import: .*\. Run pip install ")
    assert str(te_error) in str(refusal.value)
