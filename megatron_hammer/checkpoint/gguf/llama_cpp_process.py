"""llama.cpp with one model, in a process of its own: `python -P llama_cpp_process.py`, told what to do by its stdin.

The first line of stdin is a JSON object: attributes of xllamacpp.CommonParams by their path (`model.path`), members of
enums by name. It says "ready" on stdout once the model is loaded, serves llama.cpp's HTTP interface at `hostnames` (a
Unix socket, known by the ending .sock), and ends when its stdin is closed, for example because its parent has died.
Imports nothing of this package, so it starts quickly. llama.cpp aborts on files and requests that it cannot handle, and
here that ends only this process. `llama_cpp.py` is the other side.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

# Two keys that are not attributes: what the process may allocate until the model is loaded, and how much more later.
LOADING_BYTES, SERVING_BYTES = "loading_bytes", "serving_bytes"
END_LIMIT_S = 2  # for open requests, once the parent has closed stdin or died


def main() -> None:
    """Serve one model: print `ready` once it listens, end when standard input does."""
    settings = json.loads(sys.stdin.readline())
    # The parent waits for one line on stdout, so what llama.cpp prints must not get there.
    to_parent = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # llama.cpp prints to both streams
    import xllamacpp

    loading_bytes, serving_bytes = settings.pop(LOADING_BYTES, None), settings.pop(SERVING_BYTES, None)
    # CUDA reserves far more address space than it uses.
    has_limits = all(device["name"] == "CPU" for device in xllamacpp.get_device_info())
    if loading_bytes is not None and has_limits:
        limit_memory(loading_bytes)
    parameters = xllamacpp.CommonParams()
    for path, value in settings.items():
        assign(parameters, path, value)
    server = xllamacpp.Server(parameters)
    if serving_bytes is not None and has_limits:
        limit_memory(read_data_bytes() + serving_bytes)
    print("ready", file=to_parent, flush=True)
    # Returns when the parent closes the pipe or dies, so no server is left behind.
    sys.stdin.read()
    # llama.cpp waits without end for a request whose client died with the parent. The signal ends this process.
    signal.alarm(END_LIMIT_S)
    del server


def assign(parameters: Any, path: str, value: Any) -> None:
    """Set an attribute of an attribute; where the old value is a set or of an enum, so is the new one."""
    *owners, name = path.split(".")
    for owner in owners:
        parameters = getattr(parameters, owner)
    old = getattr(parameters, name)
    if isinstance(old, list) and old and hasattr(type(old[0]), "__members__"):
        value = [type(old[0])[member] for member in value]
    elif hasattr(type(old), "__members__"):
        value = type(old)[value]
    setattr(parameters, name, set(value) if isinstance(old, set) else value)


def limit_memory(num_bytes: int) -> None:
    """An allocation beyond it fails, and llama.cpp answers with an error; without it the system ends a process.

    RLIMIT_DATA counts what is allocated, and not the mapped file of the weights.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes if hard < 0 else min(num_bytes, hard), hard))


def read_data_bytes() -> int:
    """What counts for RLIMIT_DATA now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))


if __name__ == "__main__":
    main()
