"""The GPUs of this machine that CUDA gives to a process, as the driver says: this needs no torch and no CUDA context.

nvidia-smi lists every GPU of the machine. CUDA_VISIBLE_DEVICES chooses among them, as a scheduler or a user sets it.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hammer.errors import PlatformError


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU, or one slice of a GPU in MIG mode, with its name as torch.cuda.get_device_name() gives it."""

    name: str
    uuid: str
    slices: Sequence["Device"] = ()


def list_gpu_names(environment: Mapping[str, str] | None = None) -> list[str]:
    """The names of the GPUs that a CUDA process of this environment (default: os.environ) would see."""
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    chosen = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    return [device.name for device in select_devices(parse_listing(result.stdout), chosen)]


def find_gpus(platform: str) -> list[str]:
    """The names of the GPUs that a measurement uses; empty: it uses the CPU. platform: auto, cpu or cuda.

    Raises PlatformError where cuda is asked for and there is no GPU.
    """
    gpu_names = [] if platform == "cpu" else list_gpu_names()
    if platform == "cuda" and not gpu_names:
        raise PlatformError(
            "platform: cuda needs a GPU that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide, got none. "
            "Pass --platform cpu."
        )
    return gpu_names


def parse_listing(text: str) -> list[Device]:
    """The GPUs in the output of nvidia-smi -L, where the slices of a GPU are indented below it."""
    found: list[tuple[str, str, list[Device]]] = []
    for line in text.splitlines():
        if gpu := re.match(r"GPU \d+: (.+) \(UUID: ([^)]+)\)", line):
            found.append((gpu[1], gpu[2], []))
        elif found and (part := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: ([^)]+)\)", line)):
            found[-1][2].append(Device(name=f"{found[-1][0]} MIG {part[1]}", uuid=part[2]))
    return [Device(name=name, uuid=uuid, slices=slices) for name, uuid, slices in found]


def select_devices(gpus: Sequence[Device], chosen: str | None) -> list[Device]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES. chosen: None where it is not set; the empty string hides every GPU.

    Source: CUDA C++ programming guide, environment variables; MIG user guide, device enumeration.
    """
    found = list(gpus) if chosen is None else []
    for entry in [] if chosen is None else chosen.split(","):
        device = _find_device(gpus, entry.strip())
        if device is None:
            break  # CUDA ignores the rest after an entry that names nothing, such as -1
        if device in found:
            return []  # CUDA fails if an entry is repeated
        found.append(device)
    # A process gets one slice at most, and no other GPU beside it.
    sliced = [device.slices[0] if device.slices else device for device in found]
    return next(([device] for device in sliced if " MIG " in device.name), sliced)


def _find_device(gpus: Sequence[Device], entry: str) -> Device | None:
    """The device with this index, or with a UUID that begins so and is the only one."""
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    named = [device for gpu in gpus for device in (gpu, *gpu.slices) if device.uuid.startswith(entry)]
    return named[0] if len(named) == 1 else None
