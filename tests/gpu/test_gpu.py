"""What only a GPU can show: both backends are one model, they train, and they need the memory that was estimated.

Losses and gradients are those that benchmarks/gpu.py checks, with its bounds. Each run is a process of its own.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hammer.model.accounting import ParallelLayout, estimate_memory
from megatron_hammer.model.memory.options import MemoryOptions
from megatron_hammer.platforms.select import find_te_failure
from megatron_hammer.presets.catalogue import HAMMER_1B4
from tests.helpers.repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from on_gpu import gradients  # type: ignore[import-not-found]
from on_gpu.setting import build_setting, write_data  # type: ignore[import-not-found]

SETTING = build_setting(is_rehearsal=False)
HAS_GPU = torch.cuda.is_available()
NUM_LAYERS, VOCAB_SIZE, MICRO_BATCH_SIZE, SEQ_LENGTH = 4, 32_000, 2, 2048  # of hammer-1b4's width
MODEL_FLAGS = (
    *("--preset", "hammer-1b4", "--num-layers", str(NUM_LAYERS), "--vocab-size", str(VOCAB_SIZE), "--mock-data"),
    *("--micro-batch-size", str(MICRO_BATCH_SIZE), "--global-batch-size", "4"),
)
TE = pytest.param(
    "te",
    marks=pytest.mark.skipif(
        HAS_GPU and find_te_failure() is not None,
        reason="needs TransformerEngine: pip install 'transformer-engine[pytorch]'",
    ),
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_GPU, reason="needs a CUDA device: run bash tests/run.sh tests/gpu on a machine with one"
    ),
]


def start(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"}
    environment.pop("TORCH_COMPILE_DISABLE", None)
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-5000:]}"


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step on the CPU in fp32: its loss, its gradients, and the checkpoint of its weights."""
    work_dir = tmp_path_factory.mktemp("gradients")
    write_data(work_dir / "data", num_tokens=100_000, vocab_size=SETTING.num_token_ids)
    assert gradients.record_reference(SETTING, work_dir, timeout_s=600) is None
    return work_dir


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", [TE, "torch"])
def test_loss_and_gradients_are_those_of_the_cpu(backend: str, precision: str, reference_dir: Path) -> None:
    (check,) = (check for check in SETTING.checks if (check.backend, check.precision) == (backend, precision))
    result = gradients.run_check(SETTING, check, reference_dir, timeout_s=600)
    assert result["passed"], result


@pytest.mark.parametrize("backend", [TE, "torch"])
def test_training_runs_in_the_estimated_memory(backend: str, tmp_path: Path) -> None:
    metrics_path = tmp_path / "metrics.jsonl"
    launch = ("-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", "1", "--")
    schedule = (
        "--train-iters",
        "8",
        "--lr-warmup-iters",
        "2",
        "--eval-iters",
        "0",
        "--metrics-path",
        str(metrics_path),
    )
    start(*launch, *MODEL_FLAGS, *schedule, "--backend", backend)
    steps = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[0]["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=1.0)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and not line["is_skipped"] for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    if steps[-1]["mfu"] is not None:  # a GPU whose peak is known
        assert 0.01 < steps[-1]["mfu"] < 1.0
    model = dataclasses.replace(HAMMER_1B4.model, num_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE)
    (stage,) = estimate_memory(
        model,
        ParallelLayout(),
        micro_batch_size=MICRO_BATCH_SIZE,
        seq_length=SEQ_LENGTH,
        num_microbatches=2,
        options=MemoryOptions(cross_entropy="in-place"),
        context_bytes=0,  # the allocator's peak counts neither CUDA's context nor what it holds in reserve
        fragmentation_ratio=0.0,
    )
    assert steps[-1]["peak_memory_bytes"] == pytest.approx(stage.total_bytes, rel=0.15)
