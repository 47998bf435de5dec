"""A machine whose GPUs are pretended, so that the cuda platform can be run to the end of a step on a CPU.

`torch.cuda` answers as on a machine with GPUs of one type (those of the cpu platform's stand-in where no answer is
special); tensors say that they are on a GPU, and stay in memory; NCCL is gloo. Everything else is what a GPU machine
runs: our cuda platform, megatron's training loop, real process groups. What it cannot show: kernels, streams, speed,
memory. Import this before megatron, in a process of its own.
"""

import contextlib
import functools
import inspect
import os
import resource
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard

from megatron_hammer.platforms import cpu_device
from megatron_hammer.platforms import cuda as cuda_platform
from tests.helpers.matrix_products import add_product

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # megatron's @jit_fuser would compile for the pretended GPU
os.environ.setdefault("TRITON_INTERPRET", "1")  # our kernels would be compiled for it; triton reads this at import


class Gpu(NamedTuple):
    """What a program asks of a GPU."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30),
    "b200": Gpu("NVIDIA B200", (10, 0), 180 * 2**30),
}


LIBRARY = torch.library.Library("aten", "IMPL")  # what it registers lasts as long as it


class GraphSafeGenerator:
    """A GPU's generator, by default the CPU's; CUDA graphs pass generators where others pass their states."""

    def __init__(self, generator: torch.Generator = torch.default_generator):
        self.generator = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def clone_state(self) -> "GraphSafeGenerator":
        copied = torch.Generator()
        copied.set_state(self.generator.get_state())
        return GraphSafeGenerator(copied)

    graphsafe_get_state = clone_state

    def graphsafe_set_state(self, state: "GraphSafeGenerator") -> None:
        self.generator.set_state(state.generator.get_state())


class OneGenerator:
    """torch.cuda.default_generators: one generator for every device, however it is named."""

    def __getitem__(self, device: Any) -> GraphSafeGenerator:
        return GraphSafeGenerator()


class PretendedGraph:
    """torch.cuda.CUDAGraph: what is captured has run, and a replay does nothing."""

    def register_generator_state(self, generator: Any) -> None:
        pass

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def pretend_gpus(gpu: Gpu, count: int = 8) -> None:
    """Make this process believe in `count` GPUs, for good."""
    cpu_device.substitute_cuda_runtime()
    cpu_device.substitute_cuda_tensors()
    cuda: Any = torch.cuda
    major, minor = gpu.capability
    properties = types.SimpleNamespace(
        name=gpu.name, major=major, minor=minor, total_memory=gpu.memory_bytes, multi_processor_count=132
    )
    cuda.is_available = lambda: True
    cuda.device_count = lambda: count
    cuda.current_device = lambda: 0
    is_cuda = cpu_device._is_cuda
    cpu_device._is_cuda = lambda device: is_cuda(device) or type(device) is int  # the number of a GPU
    cuda.get_device_capability = lambda device=None: gpu.capability
    cuda.get_device_name = lambda device=None: gpu.name
    cuda.get_device_properties = lambda device=None: properties
    cuda.default_generators = OneGenerator()
    cuda._lazy_call, cuda._lazy_init = lambda call, **kwargs: call(), lambda: None
    tensor_class: Any = torch.Tensor
    tensor_class.is_cuda = property(lambda self: True)
    tensor_class.pin_memory = lambda self, *args, **kwargs: self
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(tensor_class, name, cpu_device._on_cpu(getattr(tensor_class, name)))
    make_tensor = torch.tensor
    torch_module: Any = torch
    torch_module.tensor = lambda *args, pin_memory=False, **kwargs: make_tensor(*args, **kwargs)
    tensor_class.record_stream = lambda self, stream: None
    for name in ("max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    # A captured graph runs once, when it is captured, and replays nothing.
    cuda.CUDAGraph, cuda.graph = PretendedGraph, lambda *args, **kwargs: contextlib.nullcontext()
    cuda.graph_pool_handle = lambda: (0, 0)
    cuda_platform.read_compute_capability = lambda index=0: gpu.capability
    for module in (_fsdp_init, _fully_shard):
        module._get_device_from_mesh = lambda mesh: cpu_device.CPU
    _use_gloo_for_nccl()
    _take_split_sizes_of_arrays()
    LIBRARY.impl("addmm.dtype_out", add_product, "CPU")


def _take_split_sizes_of_arrays() -> None:
    """NCCL takes numpy's numbers as sizes, gloo does not."""
    from megatron_hammer.platforms import megatron_compat

    megatron_compat._pass_all_to_all_splits_as_lists()


def _use_gloo_for_nccl() -> None:
    module: Any = torch.distributed
    original_init, original_new_group = module.init_process_group, module.new_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        backend, *rest = args or (kwargs.pop("backend", None),)
        assert backend == "nccl", f"the cuda platform must ask for nccl, got {backend}"
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        original_init("gloo", *rest, **kwargs)

    def new_group(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return original_new_group(*args, backend="gloo", **kwargs)

    module.init_process_group, module.new_group = init_process_group, new_group
    module.get_backend = lambda group=None: "nccl"
    # NCCL multiplies before it sums where it is asked to; gloo cannot.
    module._make_nccl_premul_sum = Premultiplied
    for name in ("all_reduce", "reduce_scatter_tensor"):
        setattr(module, name, _multiply_first(getattr(module, name)))


class Premultiplied(NamedTuple):
    """The reduction that torch.distributed._make_nccl_premul_sum makes."""

    factor: float


def _multiply_first(reduce: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(reduce)
    source = next(name for name in ("input", "tensor") if name in signature.parameters)

    @functools.wraps(reduce)
    def multiply_and_reduce(*args: Any, **kwargs: Any) -> Any:
        passed = signature.bind(*args, **kwargs)
        if isinstance(passed.arguments.get("op"), Premultiplied):
            passed.arguments[source].mul_(passed.arguments["op"].factor)
            passed.arguments["op"] = torch.distributed.ReduceOp.SUM
        return reduce(*passed.args, **passed.kwargs)

    return multiply_and_reduce
