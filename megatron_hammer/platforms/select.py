"""Which platform and backend a run uses, decided once and reported."""

import importlib
import sys
from typing import Any

import torch

from megatron_hammer.errors import PlatformError

LEAST_TE_VERSION = "2.14"  # of TransformerEngine; setup.py says which are allowed


def select_platform(requested: str = "auto", *, is_plan: bool = False, is_for_this_machine: bool = True) -> str:
    """`cuda` where PyTorch sees a GPU, else `cpu`; a request is checked, not trusted.

    is_plan: nothing will be started (--dry-run), so a GPU need not be here. is_for_this_machine: False where a plan
    names its own number of processes; it is then for a cluster, whatever this login node has.
    """
    has_gpu = torch.cuda.is_available()
    if is_plan and requested == "auto" and not is_for_this_machine:
        return "cuda"
    if requested == "cuda" and not has_gpu and not is_plan:
        raise PlatformError(
            "platform: cuda needs a GPU that PyTorch sees, got none (torch.cuda.is_available() is False). "
            "Check the driver with nvidia-smi, or pass --platform cpu."
        )
    if requested == "auto":
        return "cuda" if has_gpu else "cpu"
    return requested


def select_backend(
    requested: str = "auto", *, platform: str, is_plan: bool = False, is_for_this_machine: bool = True
) -> str:
    """`te` where TransformerEngine imports on a GPU, else `torch`; is_plan and is_for_this_machine as above.

    A plan for a cluster that asks for `te` has it there, whatever this login node has.
    """
    if platform == "cpu":
        if requested == "te":
            raise PlatformError(
                "backend: te needs a GPU, got platform=cpu. Pass --backend torch, which computes the same model."
            )
        return "torch"
    if requested == "torch" or (requested == "te" and is_plan and not is_for_this_machine):
        return requested
    failure = find_te_failure()
    if requested == "te" and failure is not None:
        raise PlatformError(
            f"backend: te needs TransformerEngine {LEAST_TE_VERSION} or later, which does not work here: {failure}. "
            f"Run pip install 'transformer-engine[pytorch]>={LEAST_TE_VERSION}', or pass --backend torch."
        )
    return "te" if failure is None else "torch"


def find_te_failure() -> str | None:
    """Why TransformerEngine cannot be used, or None where it can: installed is not enough, its libraries must load.

    The module is the one that megatron.core.extensions.transformer_engine imports; where that raises ImportError,
    megatron continues with stubs that cannot build a layer. A package that raises anything else would end megatron's
    own import, so it is hidden from this process.
    """
    try:
        importlib.import_module("transformer_engine.pytorch.fp8")
        optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    except ImportError as error:
        return str(error) or type(error).__name__
    # A wheel for another CUDA, torch or version of itself raises OSError, RuntimeError, AssertionError or what a
    # library of it raises.
    except Exception as error:
        modules: dict[str, Any] = sys.modules  # None makes every later import of it an ImportError
        modules["transformer_engine"] = None
        return f"{type(error).__name__}: {error}"
    if not hasattr(optimizers, "multi_tensor_scale_tensor"):
        # Without it megatron takes its own slow loops for the gradient norm and for clipping, and does not say so.
        return f"its version is older than {LEAST_TE_VERSION} (multi_tensor_scale_tensor is missing)"
    return None
