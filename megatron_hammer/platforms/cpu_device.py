"""The CPU stand-in for `torch.cuda`: what megatron asks of a CUDA device, answered by the CPU.

megatron-core 0.19 names the device `torch.cuda.current_device()` or the string "cuda" wherever it makes a tensor, and
orders its communication with streams and events. On the CPU there is one device and one order of execution, so the
device is `torch.device("cpu")`, streams and events are inert, and the random state is the CPU generator's.
`torch.cuda.is_available()` is left to say False: torch itself asks it, and the truthful answer keeps torch on the CPU.

Installed by `megatron_compat.install`; nothing else calls this module.
"""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.utils._device

from megatron_hammer.platforms.device import read_peak_memory_bytes

CPU = torch.device("cpu")

# Factories that megatron calls with device="cuda" (or the device index it was given by current_device()).
_FACTORY_NAMES = (
    "tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "as_tensor",
    "zeros_like", "ones_like", "empty_like", "full_like", "eye", "linspace",
)  # fmt: skip
# What Tensor.type() says for a tensor on a GPU; megatron's optimizers sort parameters by these names.
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class InertStream:
    """A stream on a device that executes in program order: every wait is already over."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "InertEvent":
        return event or InertEvent()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class InertEvent:
    """An event that has always happened; it carries no time."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_STREAM = InertStream()


def _inert_context() -> Callable[..., contextlib.AbstractContextManager[None]]:
    def do_nothing(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    return do_nothing


def _inert() -> Callable[..., None]:
    """A new function that does nothing; torch's tables of its own functions allow no object under two names."""

    def do_nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return do_nothing


def read_resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def read_memory_stats(*args: Any, **kwargs: Any) -> dict[str, int]:
    resident, peak = read_resident_bytes(), read_peak_memory_bytes()
    return {
        "reserved_bytes.all.current": resident,
        "reserved_bytes.all.peak": peak,
        "allocated_bytes.all.current": resident,
        "allocated_bytes.all.peak": peak,
        "allocation.all.current": 0,
    }


def _device_properties(*args: Any, **kwargs: Any) -> types.SimpleNamespace:
    # major=10: the architecture from which megatron no longer asks for CUDA_DEVICE_MAX_CONNECTIONS=1, a setting that
    # orders kernels on a GPU and has no meaning here.
    return types.SimpleNamespace(
        name="CPU", major=10, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
    )


def _read_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _write_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory so that device="cuda" means the CPU; any other device is left alone."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`.cuda()` of a tensor or of a module."""
    return self


def _wrap_tensor_to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _wrap_tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return original(self, *args, **kwargs)

    return type_name


def substitute_cuda_runtime() -> None:
    """Replace the entry points of `torch.cuda` that megatron's training loop calls by their CPU counterparts."""
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        # One device per process, as each rank of a GPU run sees its own.
        "device_count": lambda: 1,
        "set_device": _inert(),
        "synchronize": _inert(),
        "empty_cache": _inert(),
        "ipc_collect": _inert(),
        "current_stream": lambda device=None: _STREAM,
        "default_stream": lambda device=None: _STREAM,
        "set_stream": _inert(),
        # Megatron uses these two as context managers.
        "stream": _inert_context(),
        "device": _inert_context(),
        "Stream": InertStream,
        "Event": InertEvent,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: read_resident_bytes(),
        "memory_reserved": lambda device=None: read_resident_bytes(),
        "max_memory_allocated": lambda device=None: read_peak_memory_bytes(),
        "max_memory_reserved": lambda device=None: read_peak_memory_bytes(),
        "device_memory_used": lambda device=None: psutil.virtual_memory().used,
        "reset_peak_memory_stats": _inert(),
        "memory_stats": lambda device=None: read_memory_stats(),
        "mem_get_info": lambda device=None: (psutil.virtual_memory().available, psutil.virtual_memory().total),
        "get_device_properties": _device_properties,
        "get_device_capability": lambda device=None: (10, 0),
        "get_device_name": lambda device=None: "CPU",
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": _read_rng_state,
        "set_rng_state": _write_rng_state,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    # megatron reads these through torch.cuda.random too; the same object under both names, as in torch itself.
    torch.cuda.random.get_rng_state = _read_rng_state
    torch.cuda.random.set_rng_state = _write_rng_state
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _inert())


def substitute_cuda_tensors() -> None:
    """Make `device="cuda"`, `.cuda()`, `.to("cuda")` and `.type()` mean what megatron expects, on CPU tensors."""
    # torch lists its factories when a device context is first used; after they are replaced it would know none of them,
    # and `with torch.device("meta")` would make real tensors.
    torch.utils._device._device_constructors()
    for name in _FACTORY_NAMES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor_class: Any = torch.Tensor
    tensor_class.cuda = _stay
    tensor_class.to = _wrap_tensor_to(torch.Tensor.to)
    tensor_class.type = _wrap_tensor_type(torch.Tensor.type)
    module_class: Any = torch.nn.Module
    module_class.cuda = _stay
