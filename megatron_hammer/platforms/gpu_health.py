"""What NVIDIA's management library (NVML) and the kernel say about one GPU: errors, slowdowns, temperature, links.

NVML is asked through ctypes; its library comes with the driver, and no Python package is needed. A question that a GPU
or a driver cannot answer is None, which is not the same as 0. Names and codes: nvml.h.
"""

import ctypes
import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_hammer.platforms.cuda import open_nvml

KERNEL_LOG = "/dev/kmsg"
_UNCORRECTED, _VOLATILE, _GPU_TEMPERATURE = 1, 0, 0
_MAX_LINKS = 18  # NVML_NVLINK_MAX_LINKS
# nvmlClocksEventReason*: those of a fault or of bad cooling. A power cap (0x4) is normal under load.
SLOWDOWNS = {0x8: "hardware", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power supply"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuHealth:
    """One GPU at one moment; None where it cannot be asked.

    ecc_errors: uncorrected, since the driver was loaded. slowdowns: reasons why the clock is lowered now.
    xids: the driver's error reports about this GPU in the kernel's log since the machine started.
    """

    driver: str | None
    ecc_errors: int | None
    has_failed_row: bool | None
    slowdowns: tuple[str, ...] | None
    temperature_c: int | None
    power_w: float | None
    pcie_width: int | None
    most_pcie_width: int | None
    inactive_links: int | None
    xids: tuple[str, ...] | None


def read_gpu_health(uuid: str, library: Any = None) -> GpuHealth | None:
    """The health of the GPU with this UUID ("GPU-..."); None without NVML or where it does not know the GPU.

    library: NVML, loaded; None loads it.
    """
    handle = ctypes.c_void_p()
    with open_nvml(library) as nvml:
        if nvml is None or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        return _read(nvml, handle)


def _read(nvml: Any, handle: ctypes.c_void_p) -> GpuHealth:
    ecc = _ask(nvml.nvmlDeviceGetTotalEccErrors, handle, _UNCORRECTED, _VOLATILE, result=ctypes.c_ulonglong)
    reasons = _ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle, result=ctypes.c_ulonglong)
    power_mw = _ask(nvml.nvmlDeviceGetPowerUsage, handle, result=ctypes.c_uint)
    return GpuHealth(
        driver=_read_driver(nvml),
        ecc_errors=ecc,
        has_failed_row=_read_failed_row(nvml, handle),
        slowdowns=None if reasons is None else tuple(name for bit, name in SLOWDOWNS.items() if reasons & bit),
        temperature_c=_ask(nvml.nvmlDeviceGetTemperature, handle, _GPU_TEMPERATURE, result=ctypes.c_uint),
        power_w=None if power_mw is None else power_mw / 1e3,
        pcie_width=_ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle, result=ctypes.c_uint),
        most_pcie_width=_ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle, result=ctypes.c_uint),
        inactive_links=_count_inactive_links(nvml, handle),
        xids=_read_own_xids(nvml, handle),
    )


def _ask(question: Callable[..., int], *arguments: Any, result: Any) -> int | None:
    """The answer to a question whose last argument takes it; None where NVML returns an error."""
    answer = result()
    return answer.value if question(*arguments, ctypes.byref(answer)) == 0 else None


def _read_driver(nvml: Any) -> str | None:
    text = ctypes.create_string_buffer(80)
    return text.value.decode() if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0 else None


def _read_failed_row(nvml: Any, handle: ctypes.c_void_p) -> bool | None:
    """Whether a faulty memory row could not be replaced by a spare one, or waits for a reset (Ampere and later)."""
    counts = [ctypes.c_uint() for _ in range(4)]  # corrected, uncorrected, pending, failed
    if nvml.nvmlDeviceGetRemappedRows(handle, *map(ctypes.byref, counts)) != 0:
        return None
    return bool(counts[2].value or counts[3].value)


def _count_inactive_links(nvml: Any, handle: ctypes.c_void_p) -> int | None:
    """NVLinks that the GPU has and that are down; None for a GPU without NVLink."""
    states = [
        _ask(nvml.nvmlDeviceGetNvLinkState, handle, link, result=ctypes.c_uint) for link in range(_MAX_LINKS)
    ]  # fmt: skip
    known = [state for state in states if state is not None]
    # All of them are down on a board without bridges.
    return known.count(0) if any(known) else None


class _PciInfo(ctypes.Structure):
    """nvmlPciInfo_t of nvmlDeviceGetPciInfo_v3."""

    _fields_ = (
        ("busIdLegacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pciDeviceId", ctypes.c_uint),
        ("pciSubSystemId", ctypes.c_uint),
        ("busId", ctypes.c_char * 32),
    )


def _read_own_xids(nvml: Any, handle: ctypes.c_void_p) -> tuple[str, ...] | None:
    info = _PciInfo()
    log = read_kernel_log()
    if log is None or nvml.nvmlDeviceGetPciInfo_v3(handle, ctypes.byref(info)) != 0:
        return None
    return find_xids(log, info.domain, info.bus, info.device)


def find_xids(log: str, domain: int, bus: int, device: int) -> tuple[str, ...]:
    """The distinct Xid numbers that the driver reported for the GPU at this PCI address.

    A line of it: "NVRM: Xid (PCI:0000:3b:00): 79, pid=..., GPU has fallen off the bus."
    """
    address = f"{domain:04x}:{bus:02x}:{device:02x}"
    found = re.findall(rf"NVRM: Xid \(PCI:{address}[^)]*\): (\d+)", log, re.IGNORECASE)
    return tuple(dict.fromkeys(found))


def read_kernel_log() -> str | None:
    """What the kernel's log holds; None where this user may not read it."""
    try:
        descriptor = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    records = []
    try:
        while True:  # one record a read, until none is left
            try:
                records.append(os.read(descriptor, 8192).decode(errors="replace"))
            except BrokenPipeError:
                continue  # overwritten while it was read; the next one is there
    except OSError as error:
        if error.errno != errno.EAGAIN:
            return None
    finally:
        os.close(descriptor)
    return "".join(records)
