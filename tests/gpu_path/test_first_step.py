"""The cuda platform with the torch backend, on a machine that pretends to have GPUs: it trains what the CPU trains.

What a combination of flags costs or gains is not seen here. That it starts, computes the same losses from the same
checkpoint, and ends, is.
"""

import json
from pathlib import Path

import pytest

from tests.helpers.training_runs import TOY_MODEL, TOY_MOE, TOY_SCHEDULE, run_on_pretended_gpus, train, write_toy_data

pytestmark = pytest.mark.distributed
NUM_STEPS = 2
# name: (processes, flags). Each must train as one process of the cpu platform does.
LAYOUTS = {
    "single": (1, ""),
    "dp": (2, ""),
    "dp-whole-optimizer": (2, "--no-distributed-optimizer"),
    "tp": (2, "--tensor-model-parallel-size 2"),
    "sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp": (2, "--pipeline-model-parallel-size 2"),
    "vpp": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "tp-pp": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "recompute-all": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "recompute-attention": (1, "--recompute-granularity selective"),
    "chunked-cross-entropy": (2, "--cross-entropy chunked --tensor-model-parallel-size 2"),
    "average-in-collective": (2, "--ddp-average-in-collective"),
    "torch-fsdp": (2, "--use-torch-fsdp2"),
    "graph-of-the-step": (1, "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"),
}


class Start:
    """A model's starting checkpoint, made on the CPU, and the losses of one CPU process that trains from it."""

    def __init__(self, directory: Path, model: tuple[str, ...]):
        data = ("--data-path", write_toy_data(directory / "data"), "--data-cache-path", str(directory / "cache"))
        self.directory = directory
        self.flags = (*model, *TOY_SCHEDULE, *data, "--lr-warmup-iters", "1")
        still = ("--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0")
        train(1, directory / "start.jsonl", *self.flags, *still, "--save", str(directory / "start"))
        self.load = ("--load", str(directory / "start"), "--finetune", "--train-iters", str(NUM_STEPS))
        self.losses = [line["loss"] for line in train(1, directory / "cpu.jsonl", *self.flags, *self.load)]

    def train_on_gpus(self, num_processes: int, *flags: str) -> list[float]:
        path = self.directory / "gpu.jsonl"
        path.unlink(missing_ok=True)
        run = (*self.flags, *self.load, "--metrics-path", str(path), "--platform", "cuda", "--num-workers", "0", *flags)
        result = run_on_pretended_gpus(num_processes, *run)
        assert result.returncode == 0, f"{' '.join(flags)}\n{result.stdout[-2000:]}\n{result.stderr[-5000:]}"
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("dense"), TOY_MODEL)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("moe"), TOY_MODEL + TOY_MOE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_as_on_the_cpu(name: str, dense: Start) -> None:
    num_processes, flags = LAYOUTS[name]
    assert dense.train_on_gpus(num_processes, *flags.split()) == pytest.approx(dense.losses, rel=1e-5)


@pytest.mark.parametrize("flags", ["--rotary-percent 0.5", "--qk-layernorm"])
def test_kernels_train_as_pytorch(flags: str, tmp_path: Path) -> None:
    """Our Triton kernels, interpreted, in a model and a schedule so small that it takes seconds.

    Norms on query and key come between their split and their turn, so these are two kernels there.
    """
    small = ("--num-layers", "2", "--seq-length", "16", "--max-position-embeddings", "16", "--global-batch-size", "2")
    run = (*TOY_MODEL, *TOY_SCHEDULE, *small, "--mock-data", "--train-iters", "2", "--lr-warmup-iters", "0")
    measured = []
    for own in ("--triton-kernels", "--no-triton-kernels"):
        path = tmp_path / f"{own}.jsonl"
        place = ("--platform", "cuda", "--num-workers", "0", "--metrics-path", str(path))
        result = run_on_pretended_gpus(1, *run, *place, own, *flags.split())
        assert result.returncode == 0, f"{own}\n{result.stdout[-2000:]}\n{result.stderr[-5000:]}"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        measured.append([line[key] for line in lines for key in ("loss", "grad_norm")])
    kernels, pytorch = measured
    # fp32 rounds in another order: measured 1.1e-6 of the second step's gradient norm.
    assert kernels == pytest.approx(pytorch, rel=5e-6)
    assert kernels != pytorch  # other roundings: the kernels were there


@pytest.mark.parametrize("flags", ["", "--expert-model-parallel-size 2", "--tensor-model-parallel-size 2"])
def test_experts_train_as_on_the_cpu(flags: str, moe: Start) -> None:
    assert moe.train_on_gpus(2, *flags.split()) == pytest.approx(moe.losses, rel=1e-4)


def test_experts_train_while_their_messages_are_under_way(moe: Start) -> None:
    """megatron runs the parts of the forward pass of one micro-batch between those of another's backward pass."""
    flags = ("--precision", "bf16", "--expert-model-parallel-size", "2")
    usual = moe.train_on_gpus(2, *flags)
    assert usual == pytest.approx(moe.losses, rel=1e-2)
    assert moe.train_on_gpus(2, *flags, "--overlap-moe-expert-parallel-comm") == pytest.approx(usual, rel=1e-5)


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
def test_megatron_fsdp_reaches_its_last_step(strategy: str, dense: Start) -> None:
    """It reads no torch_dist checkpoint, so it starts from random weights."""
    start, dense.load = dense.load, ("--train-iters", str(NUM_STEPS))
    try:
        losses = dense.train_on_gpus(2, "--use-megatron-fsdp", "--data-parallel-sharding-strategy", strategy)
    finally:
        dense.load = start
    assert losses == pytest.approx(dense.losses, rel=0.02)
