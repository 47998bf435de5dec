"""Which GPUs a process gets, from the driver's listing and CUDA_VISIBLE_DEVICES."""

import subprocess
from typing import Any

import pytest

from megatron_hammer.errors import PlatformError
from megatron_hammer.scaling.hardware import visible_gpus
from megatron_hammer.scaling.hardware.visible_gpus import find_gpus, list_gpu_names, parse_listing, select_devices
from tests.helpers.messages import raises_problem

# As nvidia-smi -L prints it, with the UUIDs shortened.
LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5b-1)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-5d5b-2)
GPU 2: NVIDIA H200 NVL (UUID: GPU-77aa)
"""
SLICED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5b)
  MIG 3g.20gb     Device  0: (UUID: MIG-c738)
  MIG 1g.5gb      Device  1: (UUID: MIG-19e1)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-77aa)
"""
FIRST, SECOND, THIRD = "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA H200 NVL"


@pytest.mark.parametrize(
    ("listing", "chosen", "names"),
    [
        (LISTING, None, [FIRST, SECOND, THIRD]),
        (LISTING, "", []),
        (LISTING, "NoDevFiles", []),  # SLURM, for a job without a GPU
        (LISTING, "2,0", [THIRD, FIRST]),
        (LISTING, " 2 , 0 ", [THIRD, FIRST]),
        (LISTING, "1,-1,0", [SECOND]),
        (LISTING, "1,3,0", [SECOND]),
        (LISTING, "0,0", []),
        (LISTING, "GPU-77aa,GPU-5d5b-1", [THIRD, FIRST]),
        (LISTING, "GPU-77", [THIRD]),
        (LISTING, "GPU-5d5b", []),  # two begin so
        (SLICED, None, [f"{FIRST} MIG 3g.20gb"]),
        (SLICED, "0", [f"{FIRST} MIG 3g.20gb"]),
        (SLICED, "1", [FIRST]),
        (SLICED, "MIG-19e1", [f"{FIRST} MIG 1g.5gb"]),
        (SLICED, "MIG-c738,MIG-19e1", [f"{FIRST} MIG 3g.20gb"]),
        (SLICED, "MIG-0000", []),
        ("", None, []),
        ("No devices were found\n", "0", []),
    ],
)
def test_a_process_sees_what_cuda_would_show_it(listing: str, chosen: str | None, names: list[str]) -> None:
    assert [device.name for device in select_devices(parse_listing(listing), chosen)] == names


def test_names_come_from_the_driver_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=LISTING)
    monkeypatch.setattr(visible_gpus.subprocess, "run", lambda *args, **options: done)
    assert list_gpu_names({}) == [FIRST, SECOND, THIRD]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert list_gpu_names() == [SECOND]

    def fail(*args: Any, **options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(visible_gpus.subprocess, "run", fail)
    assert list_gpu_names({}) == []


def test_only_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_gpus, "list_gpu_names", lambda: [])
    assert (find_gpus("cpu"), find_gpus("auto")) == ([], [])
    with raises_problem(PlatformError, "platform:", "nvidia-smi", "got none", "--platform cpu"):
        find_gpus("cuda")
    monkeypatch.setattr(visible_gpus, "list_gpu_names", lambda: [FIRST])
    assert (find_gpus("cpu"), find_gpus("auto"), find_gpus("cuda")) == ([], [FIRST], [FIRST])
