"""Dense peak of a GPU by its device name, in TFLOP/s of bf16 (fp16 where a GPU has no bf16), without sparsity.

Sources: NVIDIA's data sheets of each product. Names are matched as torch.cuda.get_device_name() writes them.
"""

# First match wins, so a longer name stands before its prefix.
DENSE_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 149.7),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
)


def find_dense_peak_tflops(device_name: str) -> float | None:
    """The dense peak of one device, or None for a device that is not listed (a CPU, say): then no MFU is printed."""
    return next((peak for name, peak in DENSE_PEAK_TFLOPS if name in device_name), None)
