"""Which platform and backend a run uses, decided once and reported."""

import importlib.util

import torch

from megatron_hammer.errors import PlatformError


def select_platform(requested: str = "auto") -> str:
    """`cuda` where PyTorch sees a GPU, else `cpu`; a request is checked, not trusted."""
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise PlatformError(
            "platform: cuda needs a GPU that PyTorch sees, got none (torch.cuda.is_available() is False). "
            "Check the driver with nvidia-smi, or pass --platform cpu."
        )
    if requested == "auto":
        return "cuda" if has_gpu else "cpu"
    return requested


def select_backend(requested: str = "auto", *, platform: str) -> str:
    """`te` where TransformerEngine imports on a GPU, else `torch`."""
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if requested == "te" and platform == "cpu":
        raise PlatformError(
            "backend: te needs a GPU, got platform=cpu. Pass --backend torch, which computes the same model."
        )
    if requested == "te" and not has_te:
        raise PlatformError(
            "backend: te needs TransformerEngine, which is not installed. "
            "Run pip install 'transformer-engine[pytorch]', or pass --backend torch."
        )
    if requested == "auto":
        return "te" if platform == "cuda" and has_te else "torch"
    return requested
