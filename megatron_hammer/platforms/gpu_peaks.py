"""Dense peak of a GPU by its device name, in TFLOP/s of bf16 (fp16 where a GPU has no bf16), without sparsity.

The numbers and their sources are in `scaling/hardware/gpus.toml`.
"""

from megatron_hammer.scaling.hardware.catalogue import find_gpu_by_device_name


def find_dense_peak_tflops(device_name: str) -> float | None:
    """The dense peak of one device; None for one that is not listed, such as a CPU: then no MFU is printed."""
    gpu = find_gpu_by_device_name(device_name)
    return None if gpu is None else gpu.bf16_tflops or gpu.fp16_tflops
