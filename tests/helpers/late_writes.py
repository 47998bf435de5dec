"""Training whose checkpoints are written late: when the run has gone on for a step, which changes its state.

    (started by tests/helpers/training_runs.run_program)

WRITES, from the environment, is one of
    late        as the package writes them
    uncopied    with Megatron's own staging, which makes no copies on a CPU
    killed      the process is killed in the second write, when all bytes are in the file and the first is complete
    full        rank 1 finds the disk full in the second write
"""

import errno
import functools
import os
import signal
import sys
import time
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_hammer.platforms import checkpoint_saving
from megatron_hammer.training.observer import RunObserver
from megatron_hammer.training.pretrain import main
from tests.helpers.training_runs import read_tracker

FAULT = os.environ["WRITES"]
SAVE = Path(sys.argv[sys.argv.index("--save") + 1])
num_steps, num_writes, is_waited_for = 0, 0, False


def count_step(end_step):
    @functools.wraps(end_step)
    def ended(self, **facts):
        global num_steps
        end_step(self, **facts)
        num_steps += 1

    return ended


def note_waiting(is_done):
    @functools.wraps(is_done)
    def asked(self, blocking=False, no_dist=False):
        global is_waited_for
        is_waited_for = is_waited_for or blocking
        return is_done(self, blocking, no_dist)

    return asked


def write_late(write):
    @functools.wraps(write)
    def written(request):
        global num_writes
        num_writes += 1
        first_step = num_steps
        while num_steps == first_step and not is_waited_for:  # the last write has no step after it
            time.sleep(0.01)
        write(request)

    return written


def fail_to_sync(descriptor):
    if num_writes == 2 and FAULT == "killed":
        while not read_tracker(SAVE):  # the main thread may be about to complete the first save
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if num_writes == 2 and FAULT == "full" and os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stage(buckets):
    staged = filesystem_async.FileSystemWriterAsync.preload_tensors(buckets)
    assert [tensor.data_ptr() for tensor in list_tensors(staged)] == [t.data_ptr() for t in list_tensors(buckets)]


def list_tensors(buckets):
    return [tensor for _path, _key, (_bytes, tensors) in buckets for _item, tensor in tensors]


class FailingSystem:
    """The module os, as megatron's writer sees it."""

    fsync = staticmethod(fail_to_sync)

    def __getattr__(self, name):
        return getattr(os, name)


RunObserver.end_step = count_step(RunObserver.end_step)
checkpoint_saving.WriterThread.is_current_async_call_done = note_waiting(
    checkpoint_saving.WriterThread.is_current_async_call_done
)
checkpoint_saving._write = write_late(checkpoint_saving._write)
filesystem_async.os = FailingSystem()
if FAULT == "uncopied":
    checkpoint_saving.copy_to_host = stage
main(sys.argv[1:])
