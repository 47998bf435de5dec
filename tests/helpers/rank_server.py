"""Ranks of training runs that start quickly: each is forked from this process, which has the imports of a run.

    python tests/helpers/rank_server.py [GPU [te]]   (started and asked by tests/helpers/training_runs.py)

GPU: the machine pretends to have GPUs of this type (see pretended_gpus.py), and runs are of the cuda platform. te: and
TransformerEngine, whose Python runs over a stand-in for its compiled module (see te_stand_in.py).

Importing torch, megatron and transformers costs a rank 6 s, most of what a run of a few steps takes. Nothing else of a
rank changes: it is a process of its own, with its own environment, standard streams, process group and exit code, and
nothing has been built before it was forked. What starts ranks for users is tested by itself: unit/training/test_launch,
distributed/test_resume and the tests of examples/.

One request a line on stdin, {"num_processes", "flags", "directory", "environment", "stdout_path", "stderr_path",
"program"} (program: a script to run in the place of training, or null); one
answer a line on stdout, the exit code as megatron_hammer.training.launch gives it. The end of stdin ends this process.
"""

import argparse
import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
from typing import Any

TRAINING_MODULE = "megatron_hammer.training.pretrain"
GRACE_S = 5.0  # between SIGTERM and SIGKILL to the ranks that another one left behind


def import_what_runs_import(gpu: str | None = None, te: str | None = None) -> None:
    """Everything slow that a run imports sooner or later; it must leave this process with a single thread."""
    if gpu is not None:
        from tests.helpers.pretended_gpus import GPUS, pretend_gpus

        pretend_gpus(GPUS[gpu])
    if te is not None:
        from tests.helpers import te_stand_in
        from tests.helpers.te_wheel import provide_te_wheel

        te_stand_in.install(provide_te_wheel())
    from megatron_hammer.platforms import megatron_compat

    # A server with TransformerEngine also runs the torch backend: what that has beside is installed by the run.
    megatron_compat.install("cpu" if gpu is None else "cuda", "torch" if te is None else "te")
    import matplotlib.pyplot  # noqa: F401
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.tokenizers.text.models
    import megatron.core.tokenizers.text.text_tokenizer
    import megatron.training.distillation  # noqa: F401
    import torch._dynamo  # noqa: F401

    import megatron_hammer.config.arguments
    import megatron_hammer.config.preflight.find_problems
    import megatron_hammer.data.provider
    import megatron_hammer.model.provider
    import megatron_hammer.training.forward_step
    import megatron_hammer.training.observer  # noqa: F401

    fill_caches()
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "a forked process has none of the threads of its parent"


def fill_caches() -> None:
    """What is read from files that belong to the installation, and is the same in every run."""
    import megatron.training.arguments

    from megatron_hammer.scaling.hardware.catalogue import find_gpu_by_device_name
    from tests.helpers.flag_texts import remember_flag_texts

    remember_flag_texts()
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
    find_gpu_by_device_name("")
    # A search for garbage in a rank would touch, and so copy, every object that this process has: a third of its time.
    gc.freeze()
    atexit.register(gc.unfreeze)  # else the end of a process reports them as leaked


def serve() -> dict[str, Any] | None:
    """Answer requests until stdin ends, which returns None; in a forked rank, return the request that it is to run."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        agent = os.fork()
        if agent == 0:
            return run_ranks(request)
        _, status = os.waitpid(agent, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def run_ranks(request: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of one run and end with its exit code; in a rank, prepare the process and return its request."""
    listener = socket.create_server(("127.0.0.1", 0))
    pids = []
    for rank in range(request["num_processes"]):
        pid = os.fork()
        if pid == 0:
            become_rank(request, rank, listener.getsockname()[1])
            listener.close()
            return request
        pids.append(pid)
    from torch.distributed import TCPStore

    # Where the ranks find each other, as torchrun's own process holds it for them.
    address, port = listener.getsockname()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    code = wait_for_ranks(pids)
    del store
    os._exit(code)


def become_rank(request: dict[str, Any], rank: int, port: int) -> None:
    """Directory, environment, arguments and streams of one rank."""
    os.chdir(request["directory"])
    world_size = str(request["num_processes"])
    os.environ.update(request["environment"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [TRAINING_MODULE, *request["flags"]]
    for descriptor, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout_path"], os.O_WRONLY | os.O_APPEND),
        (2, request["stderr_path"], os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, mode)
        os.dup2(opened, descriptor)
        os.close(opened)


def wait_for_ranks(pids: list[int]) -> int:
    """Exit code of the run: 0, or that of the first rank that failed, which ends the others."""
    running, first_failure = set(pids), 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not first_failure:
            first_failure = code if code > 0 else 128 - code
            end_ranks(running)
    return first_failure


def end_ranks(running: set[int]) -> None:
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + GRACE_S
    while running and time.monotonic() < deadline_s:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    import_what_runs_import(*sys.argv[1:])
    if (request := serve()) is None:
        sys.exit()
    if request["program"] is not None:
        runpy.run_path(request["program"], run_name="__main__")
    else:
        runpy.run_module(TRAINING_MODULE, run_name="__main__", alter_sys=True)
