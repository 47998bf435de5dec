"""The stand-in for torch.cuda: "cuda" means the CPU, other devices are left alone, and nothing pretends to be timed."""

import psutil
import pytest
import torch

from megatron_hammer.platforms import cpu_device, megatron_compat

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without a GPU")


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    megatron_compat.install("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 3)])
def test_cuda_means_the_cpu(device) -> None:
    tensors = [
        torch.zeros(2, device=device),
        torch.full((2,), 7, device=device),
        torch.arange(3, device=device),
        torch.ones_like(torch.zeros(2), device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.bfloat16),
        torch.ones(2).cuda(),
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert tensors[5].dtype == torch.bfloat16
    assert torch.nn.Linear(2, 3).cuda().to(device).weight.device.type == "cpu"


def test_other_devices_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.zeros(2, dtype=torch.int8, device=torch.device("cpu")).dtype == torch.int8


def test_torch_still_reports_that_there_is_no_gpu() -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.get_device_name() == "CPU"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.int64, "torch.LongTensor"),
    ],
)
def test_type_names_sort_parameters_as_on_a_gpu(dtype: torch.dtype, name: str) -> None:
    assert torch.zeros(2, dtype=dtype).type() == name
    assert torch.zeros(2, dtype=dtype).type(torch.float64).dtype == torch.float64


def test_the_random_state_is_the_cpus() -> None:
    torch.cuda.manual_seed(3)
    state, first = torch.cuda.get_rng_state(), torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.random.set_rng_state(torch.cuda.random.get_rng_state(device="cuda"))


def test_memory_is_this_processes() -> None:
    resident = psutil.Process().memory_info().rss
    assert torch.cuda.memory_allocated() == pytest.approx(resident, rel=0.2)
    assert torch.cuda.max_memory_allocated() >= 0.9 * resident
    stats = torch.cuda.memory_stats()
    for key in ("reserved_bytes.all.current", "allocated_bytes.all.current", "allocated_bytes.all.peak"):
        assert stats[key] > 0
    assert 0 < torch.cuda.device_memory_used() <= psutil.virtual_memory().total


def test_streams_and_events_are_over_at_once_and_untimed() -> None:
    event = torch.cuda.current_stream().record_event()
    assert event.query()
    torch.cuda.Stream().wait_event(event)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.cuda.current_stream().query()
    # A time of zero would be believed.
    assert not hasattr(cpu_device.InertEvent(enable_timing=True), "elapsed_time")
