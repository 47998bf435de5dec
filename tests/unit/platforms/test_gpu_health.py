"""NVML's answers as a GpuHealth. NVML is a stand-in with the signatures of nvml.h; no GPU is here."""

import ctypes
from typing import Any

import pytest

from megatron_hammer.platforms import gpu_health
from megatron_hammer.platforms.gpu_health import find_xids, read_gpu_health

UUID = "GPU-0123"
LOG = """6,1,2,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.
6,2,3,-;NVRM: Xid (PCI:0000:5e:00): 31, pid=2, name=python
6,3,4,-;NVRM: Xid (PCI:0000:3B:00): 79, pid=1
6,4,5,-;NVRM: Xid (PCI:0000:3b:00): 48, DBE
"""
NOT_SUPPORTED = 3


class Nvml:
    """Answers of one GPU; a name that is not among them is not supported."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.num_open = 0

    def nvmlInit_v2(self) -> int:
        self.num_open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.num_open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == UUID.encode() else 6  # NVML_ERROR_NOT_FOUND

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        text.value = b"580.10"
        return 0

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, info: Any) -> int:
        info._obj.domain, info._obj.bus, info._obj.device = 0, 0x3B, 0
        return 0

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int, state: Any) -> int:
        if link >= len(self.answers.get("links", ())):
            return NOT_SUPPORTED
        state._obj.value = self.answers["links"][link]
        return 0

    def nvmlDeviceGetRemappedRows(self, handle: Any, *counts: Any) -> int:
        for count, value in zip(counts, self.answers.get("nvmlDeviceGetRemappedRows", ()), strict=False):
            count._obj.value = value
        return 0 if "nvmlDeviceGetRemappedRows" in self.answers else NOT_SUPPORTED

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> int:
            if name not in self.answers:
                return NOT_SUPPORTED
            arguments[-1]._obj.value = self.answers[name]
            return 0

        return answer


@pytest.fixture(autouse=True)
def kernel_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_health, "read_kernel_log", lambda: LOG)


def test_every_answer_is_read() -> None:
    nvml = Nvml(
        nvmlDeviceGetTotalEccErrors=2,
        nvmlDeviceGetCurrentClocksThrottleReasons=0x4 | 0x40,
        nvmlDeviceGetPowerUsage=456_000,
        nvmlDeviceGetTemperature=71,
        nvmlDeviceGetCurrPcieLinkWidth=8,
        nvmlDeviceGetMaxPcieLinkWidth=16,
        nvmlDeviceGetRemappedRows=(0, 1, 0, 1),
        links=[1, 0, 1],
    )
    health = read_gpu_health(UUID, nvml)
    assert health is not None
    assert (health.driver, health.ecc_errors, health.has_failed_row) == ("580.10", 2, True)
    assert health.slowdowns == ("heat (hardware)",)  # the power cap is normal
    assert (health.temperature_c, health.power_w) == (71, 456.0)
    assert (health.pcie_width, health.most_pcie_width, health.inactive_links) == (8, 16, 1)
    assert health.xids == ("79", "48")
    assert nvml.num_open == 0


def test_what_is_not_supported_is_none_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_health, "read_kernel_log", lambda: None)
    health = read_gpu_health(UUID, Nvml())
    assert health is not None
    unknown = {name for name in health.__slots__ if getattr(health, name) is None}
    assert unknown == set(health.__slots__) - {"driver"}


def test_an_unknown_gpu_has_no_health() -> None:
    nvml = Nvml()
    assert read_gpu_health("GPU-other", nvml) is None
    assert nvml.num_open == 0


def test_xids_are_those_of_this_gpu() -> None:
    assert find_xids(LOG, 0, 0x5E, 0) == ("31",)
    assert find_xids(LOG, 0, 0x5F, 0) == ()


def test_the_structure_has_the_layout_of_the_header() -> None:
    """nvmlPciInfo_t: 16 + 5 * 4 + 32 bytes."""
    assert ctypes.sizeof(gpu_health._PciInfo) == 68
