"""Our Triton kernels under Triton's interpreter against fp64, at sizes that no block divides; and compiled for GPUs.

Both in processes of their own: whether a kernel is interpreted is decided when it is defined, and the interpreter takes
tensors of the CPU. What is not shown: speed.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.repository import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which comes with PyTorch for CUDA"
)
# Of results of order 1. fp32: a few roundings; measured 2e-6. bf16: half a step at 4 is 0.016; measured 0.030 in norms.
TOLERANCES = {"float32": 5e-6, "bfloat16": 4e-2}


@functools.cache
def run(mode: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1" if mode == "interpret" else "0"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "kernel_runs.py"), mode]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


ROTARY = ("halves", "interleaved", "whole-head", "own-angles", "split", "split-whole-head", "split-of-a-slice")
CASES = [*(f"rotary-{name}" for name in ROTARY), "norm", "norm-of-permuted", "norm-many-rows"]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_fp64(case: str, dtype: str) -> None:
    outcome = run("interpret")[f"{case} {dtype}"]
    assert outcome["differences"], case
    assert max(outcome["differences"].values()) <= TOLERANCES[dtype], outcome
    assert outcome["dtypes"] == [f"torch.{dtype}"]


def test_the_cases_are_told_apart() -> None:
    """Twins: the same kernel against another definition of the same function differs."""
    twins = run("interpret")["twins"]
    assert set(twins) == {"rotary pairs", "rotary direction", "query and key swapped", "norm without residual"}
    assert min(twins.values()) > 0.1


def test_the_residual_is_the_input_itself_and_the_parts_hold_no_mixed_tensor() -> None:
    facts = run("interpret")["facts"]
    assert facts == {"residual shares memory": True, "parts share memory": False, "parts are contiguous": True}


def test_a_wrong_split_is_refused() -> None:
    assert "key and value must be equally wide" in run("interpret")["refusal"]


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_every_kernel_compiles_for_the_gpu(capability: str) -> None:
    """To machine code by Triton's own ptxas, which needs no GPU."""
    sizes = run("compile")[capability]
    assert sorted(sizes) == ["_rms_norm_backward", "_rms_norm_forward", "_rope_qkv", "_rope_tensor"]
    assert all(size > 1000 for size in sizes.values())
    # With sines and cosines inside, each thread would run thousands of instructions more: 42 to 84 kB.
    assert max(sizes["_rope_qkv"], sizes["_rope_tensor"]) < 38_000
