"""Packed conversations on the te backend, over the stand-in for its kernels: the loss and gradient of transformers.

Not shown: the kernels themselves, and the exchanges of context parallelism other than all-to-all.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fine_tuning import NUM_CONVERSATIONS, FineTuning
from tests.helpers.te_wheel import WheelUnavailableError, provide_te_wheel
from tests.helpers.training_runs import read_lines, run_on_pretended_gpus

pytestmark = pytest.mark.distributed
CP2 = ("--precision", "bf16", "--context-parallel-size", "2", "--cp-comm-type", "a2a")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FineTuning:
    try:
        provide_te_wheel()
    except WheelUnavailableError as error:
        pytest.skip(str(error))
    return FineTuning(tmp_path_factory.mktemp("llama"), "llama")


def train(llama: FineTuning, num_processes: int, metrics_path: Path, *flags: str) -> dict[str, Any]:
    place = ("--platform", "cuda", "--backend", "te", "--num-workers", "0", "--metrics-path", str(metrics_path))
    result = run_on_pretended_gpus(num_processes, *llama.flags, *place, *flags, has_te=True)
    assert result.returncode == 0, f"{flags}\n{result.stdout[-2000:]}\n{result.stderr[-5000:]}"
    (line,) = read_lines(metrics_path)
    return line


# One sequence per micro-batch has the fused rotary embedding, several have megatron's.
@pytest.mark.parametrize(("num_processes", "flags"), [(1, "1"), (2, "2 --pipeline-model-parallel-size 2")])
def test_packed_conversations(llama: FineTuning, tmp_path: Path, num_processes: int, flags: str) -> None:
    own = ("--global-batch-size", "8", "--micro-batch-size", *flags.split())
    llama.assert_equal(train(llama, num_processes, tmp_path / "metrics.jsonl", *own))


@pytest.mark.parametrize("packing", ["packed", "unpacked"])
def test_context_parallelism(llama: FineTuning, tmp_path: Path, packing: str) -> None:
    """In bf16, since the kernels are of 16 bits. Sequences that need padding after each conversation are more."""
    own = ("--sft-unpacked",) if packing == "unpacked" else ()
    batch = ("--global-batch-size", str(NUM_CONVERSATIONS if own else 8), "--micro-batch-size", "2")
    line = train(llama, 2, tmp_path / "metrics.jsonl", *CP2, *batch, *own)
    assert abs(line["loss"] / llama.loss - 1) < 2e-3
    assert abs(line["grad_norm"] / llama.norm - 1) < 1e-2
