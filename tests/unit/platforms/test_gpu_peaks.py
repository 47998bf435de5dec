"""Device names as torch.cuda.get_device_name() writes them find their own peak, not that of a shorter name."""

import pytest

from megatron_hammer.platforms.gpu_peaks import find_dense_peak_tflops


@pytest.mark.parametrize(
    ("device_name", "peak_tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-SXM-64GB", 358.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125.0),
    ],
)
def test_known_names(device_name: str, peak_tflops: float) -> None:
    assert find_dense_peak_tflops(device_name) == peak_tflops


@pytest.mark.parametrize("device_name", ["CPU process", "AMD Instinct MI300X", "NVIDIA RTX A1000 Laptop GPU", ""])
def test_an_unknown_device_has_no_peak(device_name: str) -> None:
    assert find_dense_peak_tflops(device_name) is None
