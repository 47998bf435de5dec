"""Start real training runs from tests, as a user would, and read what they wrote."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_hammer.data.indexed.pair import IndexedWriter
from tests.helpers.indexed_writing import add_document
from tests.helpers.repository import ROOT

TIMEOUT_S = 240

# Larger than toy_model.LLAMA: it learns, and every layout that the tests train divides its layers and heads. No two
# sizes are equal, so that a swapped axis cannot pass.
VOCAB_SIZE = 1000
TOY_MODEL = (
    *("--num-layers", "4", "--hidden-size", "96", "--ffn-hidden-size", "176", "--num-attention-heads", "8"),
    *("--group-query-attention", "--num-query-groups", "2", "--vocab-size", str(VOCAB_SIZE), "--seq-length", "64"),
    *("--max-position-embeddings", "64", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights"),
    *("--hidden-dropout", "0", "--attention-dropout", "0", "--precision", "fp32"),
)
TOY_MOE = (
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "80"),
    *("--moe-shared-expert-intermediate-size", "112", "--moe-shared-expert-gate", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-token-dispatcher-type", "alltoall"),
)
TOY_SCHEDULE = (
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--min-lr", "3e-4"),
    *("--lr-warmup-iters", "3", "--eval-iters", "0"),
)


def command(num_processes: int, *flags: str) -> list[str]:
    """The command line of a run on this machine."""
    launch = ["-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", str(num_processes), "--"]
    return [sys.executable, *launch, *flags]


def environment() -> dict[str, str]:
    """One thread a process, and this clone's package."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def start(num_processes: int, *flags: str) -> subprocess.Popen[str]:
    """Start a run as a user does, with its launcher in a session of its own."""
    return subprocess.Popen(
        command(num_processes, *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_until(is_reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until the run of this launcher has got so far; fails if it ends before."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_reached():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline_s, "it did not come so far"
        time.sleep(0.05)


def read_tracker(save: Path) -> int:
    """The step of the newest complete checkpoint in a folder; 0 without one."""
    path = save / "latest_checkpointed_iteration.txt"
    return int(path.read_text() or 0) if path.exists() else 0


def wait_until_gone(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """The processes that still run after the timeout. A zombie is gone: it holds nothing, and init may not reap it."""
    deadline_s = time.monotonic() + timeout_s
    while left := [process for process in processes if is_running(process)]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    return left


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(num_processes: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run training to its end, whatever its exit code; its ranks are forked (see rank_server) where that is safe."""
    if sys.platform == "linux":
        return _start_rank_server().run(num_processes, *flags)
    return subprocess.run(
        command(num_processes, *flags), env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )


def run_on_pretended_gpus(
    num_processes: int, *flags: str, gpu: str = "h100", has_te: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run training to its end on a machine that pretends to have GPUs of this type, whatever its exit code.

    has_te: and TransformerEngine. See pretended_gpus.py and te_stand_in.py. Our kernels are interpreted, which is slow,
    so the torch backend uses them only where flags ask for them.
    """
    is_te = has_te and "torch" not in flags
    if not is_te and "--triton-kernels" not in flags:
        flags = (*flags, "--no-triton-kernels")
    return _start_rank_server(gpu, *(["te"] if has_te else [])).run(num_processes, *flags)


def run_program(
    program: Path, num_processes: int, *flags: str, gpu: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as the ranks of a run, forked like those of training. variables: more of their environment.

    gpu: the machine pretends to have GPUs of this type.
    """
    server = _start_rank_server(*([] if gpu is None else [gpu]))
    return server.run(num_processes, *flags, program=program, variables=variables)


class RankServer:
    """A process that forks ranks of training runs; it ends with this one. machine: what it pretends to have."""

    def __init__(self, *machine: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "rank_server.py"), *machine],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(
        self, num_processes: int, *flags: str, program: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One run to its end. Raises TimeoutExpired, and ends every process of it, as subprocess.run does."""
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: Path(folder, name) for name in ("stdout_path", "stderr_path")}
            for path in streams.values():
                path.touch()
            start = {"num_processes": num_processes, "flags": flags, "directory": Path.cwd(), "program": program}
            surroundings = {"environment": environment() | dict(variables or {})}
            answer = self._ask(json.dumps(start | streams | surroundings, default=str))
            stdout, stderr = (path.read_text() for path in streams.values())
        return subprocess.CompletedProcess(command(num_processes, *flags), int(answer), stdout, stderr)

    def _ask(self, request: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        print(request, file=self.process.stdin, flush=True)
        is_answered, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        answer = self.process.stdout.readline() if is_answered else ""
        if not answer:
            _start_rank_server.cache_clear()
            code = self.process.poll()
            os.killpg(self.process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(request, TIMEOUT_S) if code is None else RuntimeError(f"server: {code}")
        return answer


@functools.cache
def _start_rank_server(*machine: str) -> RankServer:
    """The one of this process for a machine; it starts as slowly as one rank, and only the first run waits for it."""
    return RankServer(*machine)


def train(num_processes: int, metrics_path: Path, *flags: str) -> list[dict[str, Any]]:
    """Run training, which must succeed; returns its metrics, one object a step."""
    result = run(num_processes, "--metrics-path", str(metrics_path), *flags)
    assert result.returncode == 0, f"{' '.join(flags)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return read_lines(metrics_path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; of metrics.jsonl, those of steps."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "saved" not in line]


def write_toy_data(prefix: Path, *, num_documents: int = 300, seed: int = 5) -> str:
    """Indexed data that can be learned: each document counts up from a random token in a random stride."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for length in generator.integers(20, 400, num_documents):
            start, stride = generator.integers(0, VOCAB_SIZE), generator.integers(1, 4)
            add_document(writer, ((start + stride * np.arange(length)) % VOCAB_SIZE).astype(np.uint16))
    return str(prefix)
