"""Device names as torch.cuda.get_device_name() writes them find their own peak, not that of a similar name."""

import pytest

from megatron_hammer.platforms.gpu_peaks import find_dense_peak_tflops


@pytest.mark.parametrize(
    ("device_name", "peak_tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("A100-SXM4-40GB", 312.0),
        ("NVIDIA A100-SXM-64GB", 358.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GB300", 2500.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125.0),
    ],
)
def test_known_names(device_name: str, peak_tflops: float) -> None:
    assert find_dense_peak_tflops(device_name) == peak_tflops


@pytest.mark.parametrize(
    "device_name",
    [
        *("CPU process", "AMD Instinct MI300X", "NVIDIA RTX A1000 Laptop GPU", ""),
        # Other GPUs, whose names contain the name of a listed one.
        *("Tesla V100-PCIE-16GB", "Tesla V100S-PCIE-32GB", "NVIDIA A800 40GB Active", "NVIDIA GH200 144G HBM3e"),
        *("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti"),
        *("NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA H20", "NVIDIA B200 NVL", "NVIDIA L40G"),
        # Slices of a listed GPU: MIG, and a virtual machine's share.
        *("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-40C"),
    ],
)
def test_another_device_has_no_peak(device_name: str) -> None:
    assert find_dense_peak_tflops(device_name) is None
