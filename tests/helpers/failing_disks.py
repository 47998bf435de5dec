"""Training whose disk or terminal fails under it, in a mount namespace of its own.

    (started by tests/helpers/training_runs.run_program)

FAULT, from the environment, happens after the third step:
    read-only   --save becomes read-only
    deleted     --save is deleted
    logs        the file system of --metrics-path is full, and nobody reads stdout any longer
    terminal    nobody reads stdout any longer, with --verbose
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_hammer.training.observer import RunObserver
from megatron_hammer.training.pretrain import main

FAULT = os.environ["FAULT"]


def read_flag(name):
    return Path(sys.argv[sys.argv.index(name) + 1])


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)


def lose_reader():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def fail():
    save = read_flag("--save")
    if FAULT == "read-only":
        mount("--bind", save, save)
        mount("-o", "remount,bind,ro", save)
    if FAULT == "deleted":
        shutil.rmtree(save)
    if FAULT == "logs":
        filler = read_flag("--metrics-path").parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):  # until it is full
                pass


def fail_after_third_step(end_step):
    @functools.wraps(end_step)
    def ended(self, **facts):
        end_step(self, **facts)
        if facts["step"] == 3:
            fail()

    return ended


os.unshare(os.CLONE_NEWNS)
mount("--make-rprivate", "/")
if FAULT == "logs":
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", read_flag("--metrics-path").parent)
if FAULT in ("logs", "terminal"):
    lose_reader()
RunObserver.end_step = fail_after_third_step(RunObserver.end_step)
main(sys.argv[1:])
