"""What the hashes of a checkpoint cost: writing a shard with and without them, and verifying it.

    python benchmarks/checkpoint_hashes.py [--mib 512] [--rounds 5]

The rounds take turns, and times are of the processor, so that another program's load does not count. Reading and
writing of the disk itself is not part of them. The result is a ratio, which the README's section "Measured" cites.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HashingFile, hash_file

TENSOR_MIB = 64  # about a layer's largest matrix


def write(path: Path, tensors: list[torch.Tensor], open_file: Callable[[Path], object]) -> None:
    """As Megatron writes a shard: one torch file after the other, and a sync."""
    with open_file(path) as file:  # type: ignore[attr-defined]
        for tensor in tensors:
            torch.save(tensor, file)
        file.flush()
        os.fsync(file.fileno())


def time_cpu_s(function: Callable[[], object]) -> float:
    """Processor time of this process, its threads and the kernel's work for it."""
    started_at_s = time.process_time()
    function()
    return time.process_time() - started_at_s


def main() -> None:
    """Print one line for each way, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tensors = [torch.randn(TENSOR_MIB << 18) for _ in range(max(1, arguments.mib // TENSOR_MIB))]
    times_s: dict[str, list[float]] = {"write": [], "write and hash": [], "verify": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "__0_0.distcp"
        for _ in range(arguments.rounds):
            times_s["write"].append(time_cpu_s(lambda: write(path, tensors, lambda name: name.open("wb"))))
            times_s["write and hash"].append(time_cpu_s(lambda: write(path, tensors, HashingFile)))
            times_s["verify"].append(time_cpu_s(lambda: hash_file(path)))
    gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
    medians = {name: statistics.median(values) for name, values in times_s.items()}
    for name, seconds in medians.items():
        print(
            f"{name}: {seconds / gigabytes:.2f} s of one core per GB, {seconds / medians['write']:.2f} x writing alone"
        )


if __name__ == "__main__":
    main()
