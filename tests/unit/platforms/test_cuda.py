import ctypes
from typing import Any

import pytest
import torch

from megatron_hammer.platforms import cuda


class Nvml:
    """NVIDIA's management library on a machine with one GPU. failures: functions that return an error."""

    def __init__(self, *failures: str):
        self.failures, self.is_open = failures, False

    def nvmlInit_v2(self) -> int:
        self.is_open = "nvmlInit_v2" not in self.failures
        return int(not self.is_open)

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        assert self.is_open
        return int("nvmlDeviceGetHandleByIndex_v2" in self.failures or index > 0)

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 8, 9
        return int("nvmlDeviceGetCudaComputeCapability" in self.failures)


@pytest.mark.parametrize(
    ("failures", "capability"),
    [
        ((), (8, 9)),
        (("nvmlInit_v2",), None),
        (("nvmlDeviceGetHandleByIndex_v2",), None),
        (("nvmlDeviceGetCudaComputeCapability",), None),
    ],
)
def test_capability_is_read_without_cuda(
    failures: tuple[str, ...], capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Nvml(*failures)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert cuda.read_compute_capability() == capability
    assert not library.is_open


def test_a_machine_without_a_driver_has_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "NVML_LIBRARY", "libno-such-library.so.1")
    assert cuda.read_compute_capability() is None


def test_a_pretended_capability_ends_with_its_block() -> None:
    before = torch.cuda.get_device_capability
    with cuda.pretend_capability((9, 0)):
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_properties(torch.device("cuda:0")).major == 9
    assert torch.cuda.get_device_capability is before
