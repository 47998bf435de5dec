"""A platform and a backend are found by themselves, and a request that cannot be met is refused with its remedy."""

import importlib.util

import pytest
import torch

from megatron_hammer.errors import PlatformError
from megatron_hammer.platforms.select import select_backend, select_platform


@pytest.fixture
def pretend(monkeypatch):
    """pretend(gpu=..., te=...): a machine with or without a GPU and TransformerEngine."""

    def set_machine(*, gpu: bool = False, te: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *args: te or None if name == "transformer_engine" else find_spec(name, *args),
        )

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


@pytest.mark.parametrize(
    ("requested", "platform", "te", "backend"),
    [
        ("auto", "cpu", True, "torch"),
        ("auto", "cuda", False, "torch"),
        ("auto", "cuda", True, "te"),
        ("te", "cuda", True, "te"),
        ("torch", "cuda", True, "torch"),
        ("torch", "cpu", False, "torch"),
    ],
)
def test_backend(pretend, requested: str, platform: str, te: bool, backend: str) -> None:
    pretend(te=te)
    assert select_backend(requested, platform=platform) == backend


def test_te_on_cpu_is_refused(pretend) -> None:
    pretend(te=True)
    with pytest.raises(PlatformError, match=r"^backend: te needs a GPU, got platform=cpu\. Pass --backend torch"):
        select_backend("te", platform="cpu")


def test_te_that_is_not_installed_is_refused(pretend) -> None:
    pretend(te=False)
    with pytest.raises(PlatformError, match=r"^backend: te needs TransformerEngine, which is not installed\. Run pip"):
        select_backend("te", platform="cuda")
