"""Start the processes of one node, as torchrun does, and end as a user expects.

    python -m megatron_hammer.training.launch --nproc-per-node 2 -- --preset hammer-tiny ...

Everything before `--` is torchrun's (see torchrun --help); what follows goes to megatron_hammer.training.pretrain.
Three differences from torchrun: a configuration error ends with its own sentence and exit code 2, not with a report of
failed children; Ctrl-C and SIGTERM wait for the checkpoint instead of killing after 30 s; no process is restarted.
torchrun itself works as well. Under either, no training process outlives a launcher that was killed.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

from megatron_hammer.errors import ConfigError, exit_on_user_error

TRAINING_MODULE = "megatron_hammer.training.pretrain"
CHECKPOINT_GRACE_S = 1800  # how long a stopping run may take to write its checkpoint
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Launch and wait. Exits with 0, 128 + the signal that stopped the run, or the first failed child's code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__, end="")
        return
    if "--" not in argv:
        raise ConfigError(
            "launch: needs -- between torchrun's options and training's, got none. "
            f"Use python -m {__spec__.name} --nproc-per-node 2 -- --preset hammer-tiny."
        )
    split = argv.index("--")
    sys.exit(launch(argv[:split], argv[split + 1 :]))


def launch(torchrun_options: Sequence[str], training_options: Sequence[str]) -> int:
    """Run the training processes of this node to their end; returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun's own report of children that ended; what matters is printed below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = run.parse_args(
        ["--shutdown-timeout", str(CHECKPOINT_GRACE_S), *torchrun_options, "-m", TRAINING_MODULE, *training_options]
    )
    try:
        run.run(options)
    except SignalException as stop:
        return 128 + signal.Signals(stop.sigval).value
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if failure.exitcode < 0:
            print(f"error: a training process was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    return 0


def end_with_launcher() -> None:
    """Have the kernel end this training process when the launcher that started it dies (Linux).

    torchrun gives every process a session of its own. So a launcher that is killed with SIGKILL, as by the kernel when
    memory runs out, would leave its processes training, beside those of the run that replaces it and into the same
    files.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
