"""Times the operators of a training step on this machine's GPU or CPU; started by `scaling_study.py profile`.

    python -m megatron_hammer.platforms.operator_benchmark --platform cpu --output operators.json
    torchrun --standalone --nproc-per-node 2 -m megatron_hammer.platforms.operator_benchmark --output collectives.json

One process times operators. Several time collectives, and the operators that several processes of a host share memory
and cores for. One thread of a CPU is timed by its own clock (CPU seconds), which other work on the machine does not
lengthen; collectives, GPUs and several threads are timed by the wall's.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.files.publish import publish_files
from megatron_hammer.platforms.device import max_over_ranks, read_device_memory_bytes, read_device_name, stand_alone
from megatron_hammer.platforms.group_step_adam import GroupStepAdam

Call = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_CALLS, MAX_CALLS = 5, 200
NUM_SMALL_CALLS = 2000
# [m, k] x [k, n]: squares, and the products of a layer and a head at 512 to 4,096 tokens (hidden 256 and 1024).
CPU_GEMM_SHAPES = (
    *((size, size, size) for size in (128, 256, 512, 1024)),
    *((512, 256, 320), (512, 256, 256), (512, 256, 1408), (512, 704, 256), (512, 256, 4096), (704, 512, 256)),
    *((512, 1024, 5632), (512, 2816, 1024)),
)
GPU_GEMM_SHAPES = (
    *((size, size, size) for size in (512, 1024, 2048, 4096, 8192)),
    *((2048, 2048, 2560), (2048, 2048, 11264), (2048, 5632, 2048), (4096, 4096, 6144), (4096, 4096, 28672)),
    *((4096, 14336, 4096), (8192, 8192, 10240), (8192, 8192, 57344), (8192, 28672, 8192)),
)
# Sequence lengths, heads and their width.
CPU_ATTENTION = ((256, 512, 1024), 16, 16)
GPU_ATTENTION = ((1024, 2048, 4096, 8192), 16, 128)
MESSAGE_BYTES = tuple(4**power for power in range(5, 13))  # 1 KiB to 16 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorTiming:
    """Seconds of one call, and the operations and bytes that it does: read and written, or sent by one rank."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    num_processes: int
    median_s: float
    fastest_s: float
    flops: float = 0.0
    num_bytes: float = 0.0


def time_on_cpu(call: Call, num_calls: int, clock: Callable[[], float]) -> list[float]:
    times_s = []
    for _ in range(num_calls):
        started_at_s = clock()
        call()
        times_s.append(clock() - started_at_s)
    return times_s


class Bench:
    """Times calls on one device for about `seconds_per_operator` each and keeps the timings."""

    def __init__(self, platform: str, seconds_per_operator: float):
        self.device = "cuda" if platform == "cuda" else "cpu"
        self.seconds = seconds_per_operator
        self.has_one_thread = self.device == "cpu" and torch.get_num_threads() == 1
        self.num_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.timings: list[OperatorTiming] = []

    def add(
        self,
        operator: str,
        shape: tuple[int, ...],
        dtype: str,
        call: Call,
        *,
        flops: float = 0.0,
        num_bytes: float = 0.0,
        is_alone: bool = True,
    ) -> None:
        """Time `call` and keep the slowest rank's median and fastest. is_alone: it waits for no other process."""
        times_s = self._time(call, time.thread_time if is_alone and self.has_one_thread else time.perf_counter)
        self._keep(operator, shape, dtype, times_s, flops=flops, num_bytes=num_bytes)

    def _keep(self, operator: str, shape: tuple[int, ...], dtype: str, times_s: list[float], **work: float) -> None:
        median_s, fastest_s = statistics.median(times_s), min(times_s)
        if self.num_processes > 1:
            median_s, fastest_s = max_over_ranks(median_s), max_over_ranks(fastest_s)
        self.timings.append(
            OperatorTiming(
                operator=operator,
                shape=shape,
                dtype=dtype,
                num_processes=self.num_processes,
                median_s=median_s,
                fastest_s=fastest_s,
                **work,
            )
        )

    def _time(self, call: Call, clock: Callable[[], float]) -> list[float]:
        """Seconds of each call after two that are not counted. All ranks make equally many."""
        call()
        self._wait()
        started_at_s = time.perf_counter()
        call()
        self._wait()
        # The clock may not advance during a very short call, and the next line divides by this.
        first_s = max(time.perf_counter() - started_at_s, 1e-7)
        if self.num_processes > 1:
            # All ranks must make equally many calls of a collective, or the last ones wait for ever.
            first_s = max_over_ranks(first_s)
        num_calls = min(MAX_CALLS, max(MIN_CALLS, int(self.seconds / first_s)))
        if self.num_processes > 1:
            # The ranks start together, so the first call does not contain the wait for the slowest rank.
            torch.distributed.barrier()
        return self._time_on_gpu(call, num_calls) if self.device == "cuda" else time_on_cpu(call, num_calls, clock)

    def _time_on_gpu(self, call: Call, num_calls: int) -> list[float]:
        """Events around each call, all queued before the first is read, so that the host does not show."""
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_calls)
        ]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        # elapsed_time is in milliseconds.
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time_small_calls(self) -> None:
        """Seconds of the host for one operator on a few elements: what every operator costs before it computes."""
        small = torch.zeros(16, device=self.device)
        self._wait()
        clock = time.thread_time if self.has_one_thread else time.perf_counter
        times_s = []
        for _ in range(5):
            started_at_s = clock()
            for _ in range(NUM_SMALL_CALLS):
                small.add_(1.0)
            times_s.append((clock() - started_at_s) / NUM_SMALL_CALLS)
            self._wait()
        self._keep("launch", (16,), "fp32", times_s)


# --- one process -----------------------------------------------------------------------------------------------------


def time_gemms(bench: Bench, dtype: str) -> None:
    """Products into a buffer that is there, as a linear's forward pass writes them."""
    for m, k, n in GPU_GEMM_SHAPES if bench.device == "cuda" else CPU_GEMM_SHAPES:
        left, right = random_tensor(bench, dtype, m, k), random_tensor(bench, dtype, k, n)
        result = torch.empty(m, n, dtype=DTYPES[dtype], device=bench.device)
        element_bytes = left.element_size()
        bench.add(
            "gemm",
            (m, k, n),
            dtype,
            partial(torch.mm, left, right, out=result),
            flops=2.0 * m * k * n,
            num_bytes=float(element_bytes * (m * k + k * n + m * n)),
        )


def time_fp8_gemms(bench: Bench) -> None:
    """Products of e4m3 with one scale a tensor, where the GPU multiplies fp8 (Ada, Hopper, Blackwell)."""
    if bench.device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        return
    scale = torch.ones((), device="cuda")
    for m, k, n in GPU_GEMM_SHAPES:
        left = random_tensor(bench, "bf16", m, k).to(torch.float8_e4m3fn)
        right = random_tensor(bench, "bf16", n, k).to(torch.float8_e4m3fn).t()  # columns lie together, as it wants
        bench.add(
            "gemm",
            (m, k, n),
            "fp8",
            partial(torch._scaled_mm, left, right, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16),
            flops=2.0 * m * k * n,
            num_bytes=float(m * k + k * n + 2 * m * n),
        )


def time_attention(bench: Bench, dtype: str) -> None:
    """Causal attention of one layer, forward, and forward with backward; FLOPs with the masked half left out."""
    lengths, heads, width = GPU_ATTENTION if bench.device == "cuda" else CPU_ATTENTION
    for length in lengths:
        qkv = [random_tensor(bench, dtype, 2, heads, length, width).requires_grad_() for _ in range(3)]
        grad = random_tensor(bench, dtype, 2, heads, length, width)

        def attend(qkv: list[torch.Tensor] = qkv) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)

        def attend_and_back(qkv: list[torch.Tensor] = qkv, grad: torch.Tensor = grad) -> Any:
            return torch.autograd.grad(attend(qkv), qkv, grad)

        # 2 products (scores, and values) of 2 FLOPs per multiply-add over a batch of 2, halved by the causal mask.
        shape, flops = (2, heads, length, width), 2.0 * 2 * heads * length * length * width
        bench.add("attention", shape, dtype, torch.no_grad()(attend), flops=flops)
        # Backward has 5 products where forward has 2, since it recomputes the scores: 3.5 times in all.
        bench.add("attention_with_backward", shape, dtype, attend_and_back, flops=3.5 * flops)


def time_pointwise(bench: Bench, dtype: str) -> None:
    """What memory bounds: a copy, a sum, RMSNorm and SwiGLU (forward), with the bytes that they read and write."""
    rows, width = (8192, 4096) if bench.device == "cuda" else (2048, 1024)
    left, right, weight = (
        random_tensor(bench, dtype, rows, width),
        random_tensor(bench, dtype, rows, width),
        random_tensor(bench, dtype, width),
    )
    result = torch.empty_like(left)
    size = left.element_size() * left.numel()
    functional = torch.nn.functional
    bench.add("copy", (rows, width), dtype, lambda: result.copy_(left), num_bytes=2.0 * size)
    bench.add("add", (rows, width), dtype, lambda: torch.add(left, right, out=result), num_bytes=3.0 * size)
    bench.add(
        "rms_norm", (rows, width), dtype, torch.no_grad()(lambda: functional.rms_norm(left, (width,), weight)),
        num_bytes=2.0 * size,
    )  # fmt: skip
    bench.add(
        "swiglu", (rows, width), dtype, torch.no_grad()(lambda: functional.silu(left) * right), num_bytes=5.0 * size
    )


def time_loss(bench: Bench) -> None:
    """Cross-entropy over a vocabulary with its backward pass, in fp32: read, written as probabilities, as gradient."""
    rows, vocabulary = (2048, 131_072) if bench.device == "cuda" else (512, 4096)
    logits = random_tensor(bench, "fp32", rows, vocabulary).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=bench.device)

    def compute_loss() -> Any:
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), logits)

    # 4 passes over fp32 logits of 4 bytes.
    num_bytes = 16.0 * rows * vocabulary
    bench.add("cross_entropy_with_backward", (rows, vocabulary), "fp32", compute_loss, num_bytes=num_bytes)


def time_optimizer(bench: Bench) -> None:
    """A step of Adam on fp32 weights: weight, gradient and both moments read, all but the gradient written."""
    num_parameters = 2**28 if bench.device == "cuda" else 2**22
    weight = torch.nn.Parameter(random_tensor(bench, "fp32", num_parameters))
    weight.grad = random_tensor(bench, "fp32", num_parameters)
    optimizer = GroupStepAdam([weight], lr=1e-3, weight_decay=0.1)
    # 28 bytes = 7 passes of 4 bytes: 4 values read and 3 written.
    bench.add("adam", (num_parameters,), "fp32", optimizer.step, num_bytes=28.0 * num_parameters)


def random_tensor(bench: Bench, dtype: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=bench.device).to(DTYPES[dtype])


# --- several processes -----------------------------------------------------------------------------------------------


def time_collectives(bench: Bench) -> None:
    """All-reduce, all-gather and reduce-scatter of a group of all ranks, and a message to the next rank and back.

    num_bytes: the size of the whole tensor on a rank, which a ring sends (n - 1) / n of (all-reduce: twice).
    """
    world = torch.distributed.get_world_size()
    for num_bytes in MESSAGE_BYTES:
        # fp32 elements of 4 bytes, in equal parts for all ranks.
        count = max(world, num_bytes // 4 // world * world)
        whole = torch.zeros(count, device=bench.device)
        part = torch.zeros(count // world, device=bench.device)
        calls: dict[str, Call] = {
            "all_reduce": partial(torch.distributed.all_reduce, whole),
            "all_gather": partial(torch.distributed.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(torch.distributed.reduce_scatter_tensor, part, whole),
            "send_receive": partial(exchange, whole),
        }
        for name, call in calls.items():
            bench.add(name, (count,), "fp32", call, num_bytes=4.0 * count, is_alone=False)


def exchange(tensor: torch.Tensor) -> None:
    """Ranks 0 and 1 send the tensor to and fro; the others wait. One call is two messages, one after the other."""
    rank = torch.distributed.get_rank()
    if rank == 0:
        torch.distributed.send(tensor, 1)
        torch.distributed.recv(tensor, 1)
    elif rank == 1:
        torch.distributed.recv(tensor, 0)
        torch.distributed.send(tensor, 0)


# --- entry -----------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON, written by rank 0 when complete")
    parser.add_argument("--platform", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--precision", choices=list(DTYPES), action="append", help="default: by platform")
    parser.add_argument("--seconds-per-operator", type=float, default=0.3)
    return parser.parse_args()


def count_multiprocessors(platform: str) -> int:
    """Of one GPU; a core of a CPU works on one tile at a time."""
    return torch.cuda.get_device_properties(0).multi_processor_count if platform == "cuda" else 1


@contextlib.contextmanager
def open_group(platform: str) -> Iterator[None]:
    """A process group where a launcher started several processes, and this process's GPU."""
    if platform == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Collectives are not timed with one process, so it needs no group.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    stand_alone()
    torch.distributed.init_process_group("nccl" if platform == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def time_all(bench: Bench, precisions: list[str]) -> None:
    """Everything that this number of processes is for."""
    if bench.num_processes > 1:
        time_collectives(bench)
        time_pointwise(bench, precisions[0])
        time_gemms(bench, precisions[0])
        return
    for precision in precisions:
        time_gemms(bench, precision)
        time_attention(bench, precision)
        time_pointwise(bench, precision)
    time_fp8_gemms(bench)
    time_loss(bench)
    time_optimizer(bench)
    bench.time_small_calls()


def main() -> None:
    """Run the command; see --help. Every rank times, and rank 0 writes the JSON."""
    arguments = parse_arguments()
    platform = arguments.platform
    if platform == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    precisions = arguments.precision or (["bf16", "fp32"] if platform == "cuda" else ["fp32"])
    with open_group(platform):
        bench = Bench(platform, arguments.seconds_per_operator)
        time_all(bench, precisions)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            report = {
                "device_name": read_device_name(platform),
                "platform": platform,
                "num_processes": bench.num_processes,
                "num_threads": torch.get_num_threads(),
                "num_cores": len(os.sched_getaffinity(0)),
                "num_multiprocessors": count_multiprocessors(platform),
                "memory_bytes": read_device_memory_bytes(platform),
                "versions": {"torch": torch.__version__},
                "timings": [asdict(timing) for timing in bench.timings],
            }
            publish_files({arguments.output: json.dumps(report, indent=1) + "\n"})


if __name__ == "__main__":
    main()
