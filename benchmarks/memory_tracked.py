#!/usr/bin/env python3
"""The memory model against PyTorch's fake tensors: every tensor that one rank's training step holds, without a GPU.

    python benchmarks/memory_tracked.py
    python benchmarks/memory_tracked.py --flags "--preset tinyllama-1b1 --micro-batch-size 4"

A row is a command line of training. Its model, its optimizer and two training steps are Megatron's own (`train_step`)
on a pretended H100, and every tensor is a fake one: a shape and a dtype without contents, so hammer-1b4 needs no
memory. A dispatch mode sees each operator's outputs and counts the bytes of their storages from creation to release,
rounded up to 512 as by torch's allocator. The peak of the second step is compared with `estimate_memory`; at the first
one, Adam's moments do not exist yet.

Fake tensors do not show workspaces inside kernels, the allocator's fragmentation and CUDA's context; both sides leave
them out. Triton kernels are not launched; what their callers allocate is counted. torch's RMSNorm of a GPU is
described by hand (`FusedRmsNorm`), since a CPU composes it of other operators. Functions that Megatron compiles on a
GPU run uncompiled here and hold more than a compiled one would.
"""

import argparse
import logging
import multiprocessing
import os
import shlex
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone, whichever folder this is started in

import torch
import torch.distributed
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_hammer.files.tables import build_table, open_console, print_json
from megatron_hammer.model.accounting import estimate_memory
from megatron_hammer.model.byte_units import GIB

PARTS = ("weights", "gradients", "optimizer", "working", "logits", "total")

NUM_KINDS_LISTED = 40
ALLOCATION_BYTES = 512  # torch's caching allocator rounds every block up to it
# Collectives of whole lists, which have no fake tensors: they write into tensors that are there.
COALESCED = (
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)
_SELECTIVE = ("--recompute-granularity", "selective")
_FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
_TP2 = ("--tensor-model-parallel-size", "2")


def _row(micro_batch_size: int, *flags: str, preset: str = "hammer-1b4", ranks: int = 1) -> tuple[str, ...]:
    sizes = ("--micro-batch-size", str(micro_batch_size), "--global-batch-size", str(micro_batch_size * ranks))
    return ("--preset", preset, *sizes, *flags)


ROWS: dict[str, tuple[str, ...]] = {
    "micro-batch 1": _row(1),
    "micro-batch 4": _row(4),
    "micro-batch 8": _row(8),
    "without our kernels": _row(4, "--no-triton-kernels"),
    "gradients not fused": _row(4, "--no-gradient-accumulation-fusion"),
    "core attention recomputed": _row(4, *_SELECTIVE),
    "MLP recomputed": _row(4, *_SELECTIVE, "--recompute-modules", "mlp"),
    "all layers recomputed": _row(4, *_FULL),
    "all layers recomputed, micro-batch 16": _row(16, *_FULL),
    "32 query groups": _row(4, "--num-query-groups", "32"),
    "without our Triton kernels": _row(4, "--no-triton-kernels"),
    "SwiGLU not fused": _row(4, "--no-bias-swiglu-fusion"),
    "loss in chunks": _row(8, "--cross-entropy", "chunked"),
    "fp32": _row(2, "--precision", "fp32"),
    "tensor parallel 2": _row(4, *_TP2),
    "tensor and sequence parallel 2": _row(4, *_TP2, "--sequence-parallel"),
    "data parallel 2": _row(4, "--dry-run", "--world-size", "2", ranks=2),
    "gpt2-124m: tied, GELU, LayerNorm, dropout": _row(16, preset="gpt2-124m"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracked:
    """Bytes of one rank: the state between two steps, and the rest at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    working: int  # activations, logits and what comes and goes
    logits: int  # of `working`: tensors of one row per token and one column per entry of the vocabulary
    largest: list[str]

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.working


class Storage(NamedTuple):
    """One block of memory, and the operator that made it."""

    num_bytes: int
    width: int  # of the last dimension
    operator: str


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of live storages, and remembers which lived at the peak.

    Fake tensors have no values. A question for one, such as a gradient norm's, is answered with 1, and a question of
    yes or no, such as whether something is NaN, with no.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Storage] = {}  # by the storage's address
        self.live_bytes = self.peak_bytes = 0
        self.at_peak: list[Storage] = []
        self._is_at_peak = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else int(args[0].dtype != torch.bool)
        if func in COALESCED:
            return FakeWork().boxed()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, str(func))
        return result

    def _add(self, tensor: torch.Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self.live[key] = Storage(num_bytes, tensor.shape[-1] if tensor.dim() else 1, operator)
        weakref.finalize(storage, self._remove, key).atexit = False
        self.live_bytes += num_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._is_at_peak = self.live_bytes, True

    def _remove(self, key: int) -> None:
        self._keep_peak()
        self.live_bytes -= self.live.pop(key).num_bytes

    def _keep_peak(self) -> None:
        """Before a release: the storages of a new peak. Listing them at each allocation would take minutes."""
        if self._is_at_peak:
            self.at_peak, self._is_at_peak = list(self.live.values()), False

    def start_step(self) -> None:
        self.peak_bytes, self._is_at_peak = self.live_bytes, True


class FusedRmsNorm(torch.autograd.Function):
    """What torch's RMSNorm of a GPU holds: its input, its weight and one number per row; on a CPU it is composed.

    Source: aten._fused_rms_norm and its backward formula in torch's derivatives.yaml.
    """

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return tuple(map(torch.empty_like, context.saved_tensors[:2]))


def track(flags: Sequence[str]) -> tuple[Tracked, Any]:
    """What the command line's rank 0 holds, and its plan. Changes this process for good."""
    arguments, plan, config = prepare(flags)
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_hammer.training.forward_step import ForwardStep

    with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker() as tracker:
        model, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=config,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        batches = make_batches(plan)
        for _ in range(2):
            tracker.start_step()
            training.train_step(
                ForwardStep(plan), batches, model, optimizer, scheduler, config.model.transformer,
                get_forward_backward_func(), iteration=0,
            )  # fmt: skip
        tracker._keep_peak()
        weights = count_bytes(parameter.data for parameter in model[0].parameters())
        gradients = count_bytes(parameter.main_grad for parameter in model[0].parameters())
        state_bytes = sum(storage.num_bytes for storage in tracker.live.values())
    num_columns = arguments.namespace.padded_vocab_size // plan.layout.tensor_model_parallel_size
    tracked = Tracked(
        weights=weights,
        gradients=gradients,
        optimizer=state_bytes - weights - gradients,
        working=tracker.peak_bytes - state_bytes,
        logits=sum(storage.num_bytes for storage in tracker.at_peak if storage.width == num_columns),
        largest=list_largest(tracker.at_peak),
    )
    return tracked, plan


def list_largest(storages: Sequence[Storage]) -> list[str]:
    """The kinds of storages with most bytes, for a person who looks for the cause of a difference."""
    counts = Counter(storages)
    kinds = sorted(counts, key=lambda storage: -counts[storage] * storage.num_bytes)
    return [f"{counts[kind]} x {kind.num_bytes} bytes of {kind.operator}" for kind in kinds[:NUM_KINDS_LISTED]]


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def launch_no_kernels() -> None:
    """Triton's launches do nothing: their outputs are tensors that the caller has made, which are all they hold."""
    from triton.runtime.jit import KernelInterface

    from megatron_hammer.model import cross_entropy, cross_entropy_triton

    kernel_class: Any = KernelInterface
    kernel_class.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: None
    loss: Any = cross_entropy
    loss._select_kernels = lambda logits: cross_entropy_triton


def cast_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Module.bfloat16; torch's own would swap the fake parameters, which it refuses."""
    for parameter in module.parameters():
        if parameter.dtype != torch.bfloat16:  # such as position embeddings
            parameter.data = parameter.data.bfloat16()
    return module


def make_batches(plan: Any) -> Iterator[dict[str, torch.Tensor]]:
    shape = (plan.batch.micro_batch_size, plan.seq_length)
    while True:
        tokens = torch.zeros(shape, dtype=torch.int64)
        yield {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": torch.ones(shape)}


def prepare(flags: Sequence[str]) -> tuple[Any, Any, Any]:
    """Arguments, plan and Megatron's configuration of rank 0 on a pretended H100, with groups that send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["TRITON_INTERPRET"] = "0"  # else pretended_gpus has kernels interpreted, and none shall run
    from tests.helpers.pretended_gpus import GPUS, pretend_gpus

    distributed: Any = torch.distributed
    init_process_group, new_group = distributed.init_process_group, distributed.new_group
    pretend_gpus(GPUS["h100"])

    def new_silent_group(*args: Any, **kwargs: Any) -> Any:
        options = {name: value for name, value in kwargs.items() if name not in ("device_id", "pg_options")}
        return new_group(*args, **(options | {"backend": "fake"}))

    def gather_own_object(gathered: list[Any], value: Any, **_: Any) -> None:
        gathered[:] = [value] * len(gathered)  # as where all ranks hold the same

    distributed.new_group, distributed.all_gather_object = new_silent_group, gather_own_object
    torch_module: Any = torch
    make_tensor = torch.tensor

    def make_tensor_of_numbers(data: Any, **kwargs: Any) -> torch.Tensor:
        """torch.tensor of a list of fake scalars, which torch itself would read in C++, past the tracker."""
        return make_tensor(tree_map_only(torch.Tensor, torch.Tensor.item, data), **kwargs)

    torch_module.tensor = make_tensor_of_numbers
    functional: Any = torch.nn.functional
    functional.rms_norm = lambda hidden, shape, weight=None, eps=None: FusedRmsNorm.apply(hidden, weight)
    module_class: Any = torch.nn.Module
    module_class.bfloat16 = cast_parameters
    from megatron_hammer.training import pretrain

    # Never refused for its size, which is what is examined. One micro-batch: the next ones hold nothing else.
    arguments = pretrain.prepare([*flags, "--mock-data", "--gpu-memory-gib", "10000"], is_plan=True)
    plan = pretrain.check(arguments)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(plan.layout.world_size))
    init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.layout.world_size)

    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_hammer.config.arguments import build_config_container, finalize_arguments
    from megatron_hammer.model.provider import build_model_config

    launch_no_kernels()
    finalize_arguments(arguments)
    parallel_state.initialize_model_parallel(plan.layout.tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(1)
    initialize_rerun_state_machine()
    return arguments, plan, build_config_container(arguments, build_model_config)


def examine(flags: Sequence[str], result: Connection) -> None:
    """One row, in a process of its own: sends its dictionary, or the error that stopped it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Megatron prints its arguments
    logging.disable(logging.CRITICAL)
    try:
        tracked, plan = track(flags)
        result.send(compare(tracked, plan))
    except Exception as error:
        result.send(f"{type(error).__name__}: {error}")


def compare(tracked: Tracked, plan: Any) -> dict[str, Any]:
    """Bytes of each part as estimated and as tracked."""
    (estimate,) = estimate_memory(
        plan.model,
        plan.layout,
        micro_batch_size=plan.batch.micro_batch_size,
        seq_length=plan.seq_length,
        num_microbatches=plan.num_microbatches,
        options=replace(plan.memory, workspace_bytes=0),
        context_bytes=0,
        fragmentation_ratio=0.0,
    )
    state = estimate.state_bytes + estimate.buffers_bytes
    estimated = {
        "weights": estimate.weights_bytes,
        "gradients": estimate.gradients_bytes,
        "optimizer": estimate.optimizer_bytes + estimate.buffers_bytes,
        "working": estimate.allocated_bytes - state,
        "logits": estimate.logits_bytes,
        "total": estimate.allocated_bytes,
    }
    return {"estimated": estimated, "tracked": {**asdict(tracked), "total": tracked.total}}


def examine_apart(flags: Sequence[str]) -> dict[str, Any] | str:
    """`examine` in a forked process: pretended GPUs and Megatron's globals last as long as their process."""
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    process = forking.Process(target=examine, args=(flags, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"


def build_rows(results: Mapping[str, dict[str, Any] | str]) -> list[tuple[str, ...]]:
    rows = []
    for name, result in results.items():
        if isinstance(result, str):
            rows.append((name, result, *[""] * 5))
            continue
        estimated, tracked = result["estimated"], result["tracked"]
        ratios = (f"{estimated[part] / tracked[part]:.3f}" if tracked[part] else "" for part in PARTS)
        rows.append((name, f"{tracked['total'] / GIB:.2f}", f"{tracked['working'] / GIB:.2f}", *ratios))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", action="append", help="a row of your own in place of the list; may be repeated")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="of the list (all)")
    parser.add_argument("--json", action="store_true", help="bytes of every part, and what was largest at the peak")
    arguments = parser.parse_args()
    rows = {text: tuple(shlex.split(text)) for text in arguments.flags or ()} or {
        name: ROWS[name] for name in arguments.rows
    }
    results = {}
    for name, flags in rows.items():
        results[name] = examine_apart(flags)
        print(f"{len(results)} of {len(rows)}: {name}", file=sys.stderr)
    if arguments.json:
        print_json(results)
    else:
        title = "estimated / tracked"
        columns = ("row", "tracked GiB", "beside the state", *PARTS)
        open_console().print(build_table(title, columns, build_rows(results)))
    if any(isinstance(result, str) for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
