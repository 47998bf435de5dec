"""The `cuda` platform before CUDA starts: what the driver says without being initialised."""

import contextlib
import ctypes
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

NVML_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver


def read_compute_capability(index: int = 0) -> tuple[int, int] | None:
    """(major, minor) of a GPU by NVML, which leaves CUDA uninitialised; None without a driver or that GPU.

    torch.cuda cannot be asked: it initialises CUDA, and CUDA reads its environment variables only then.
    """
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    with open_nvml() as nvml:
        if nvml is None:
            return None
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        failed = failed or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return None if failed else (major.value, minor.value)


@contextlib.contextmanager
def open_nvml(library: Any = None) -> Iterator[Any]:
    """NVIDIA's management library, ready for questions; None without it or without a driver.

    library: NVML, loaded; None loads it.
    """
    try:
        nvml = ctypes.CDLL(NVML_LIBRARY) if library is None else library
    except OSError:
        nvml = None
    # 0 is NVML_SUCCESS. The library may be installed where no driver is loaded, as in a container.
    if nvml is None or nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


@contextlib.contextmanager
def pretend_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Let torch.cuda answer for a GPU of this compute capability, on a machine without one."""
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
    ):
        yield
