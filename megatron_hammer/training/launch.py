"""Start the processes of one node, as torchrun does, and end as a user expects.

    python -m megatron_hammer.training.launch --nproc-per-node 2 -- --preset hammer-tiny ...

Everything before `--` is torchrun's (see torchrun --help); what follows goes to megatron_hammer.training.pretrain.
Four differences from torchrun: a configuration error ends with its own sentence and exit code 2, not with a report of
failed children; Ctrl-C, SIGTERM and SIGHUP wait for the checkpoint instead of killing after 30 s, also when they come
again; SIGUSR1, with which a scheduler announces the end of a job's time, does so too and ends with exit code 0;
--max-restarts (default 0) resumes from the newest checkpoint, and stops where the run gets no further
(training/supervision/). torchrun itself works as well, without the restarts. Under either, no training process outlives
a launcher that was killed. Two options are not torchrun's:

    --hang-timeout SECONDS   a run that does not move for so long after its start hangs: the rank and host that hold it
                             up are named, and the stacks of all ranks are in their logs (default: ten steps, at least
                             60 s, at most half of --distributed-timeout-minutes)
    --end-hangs              then end the attempt, which --max-restarts may start again

and so are two settings of --rdzv-conf: join_timeout, how long the nodes wait for each other at the start (600 s), and
rejoin_timeout, how long for a node that was lost (60 s).
"""

import argparse
import contextlib
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from megatron_hammer.config.own_flags import read_option
from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.read import refuse_pipes
from megatron_hammer.platforms.parent_process import end_with_parent
from megatron_hammer.platforms.stop_signals import STOP_SIGNALS
from megatron_hammer.training.terminal import lose_what_is_not_taken

TRAINING_MODULE = "megatron_hammer.training.pretrain"
CHECKPOINT_GRACE_S = 1800  # for the checkpoint of a run that is stopped, unless --shutdown-timeout says otherwise
DEFAULT_TIMEOUT_MINUTES = 10  # of collectives; Megatron's
DEFAULT_MASTER_PORT = 29500  # torchrun's
PORT_RELEASE_S = 10.0  # for the kernel to end a launcher that was killed just before, which still has the port


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Launch and wait. Exits with 0, the code of the signal that stopped the run, or the first failed child's code."""
    die_silently_of_interrupts()
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__, end="")
        return
    if "--" not in argv:
        raise ConfigError(
            "launch: needs -- between torchrun's options and training's, got none. "
            f"Use python -m {__spec__.name} --nproc-per-node 2 -- --preset hammer-tiny."
        )
    num_tasks, num_nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("TASKS", "NODES"))
    if num_tasks > num_nodes:
        raise ConfigError(
            f"launch: must be started once on each node, got {num_tasks} tasks of srun on {num_nodes} nodes. Use srun "
            f"--ntasks-per-node 1, or have srun start every process: srun python -m {TRAINING_MODULE} ..."
        )
    split = argv.index("--")
    sys.exit(launch(argv[:split], argv[split + 1 :]))


def launch(torchrun_options: Sequence[str], training_options: Sequence[str]) -> int:
    """Run the training processes of this node to their end; returns the exit code."""
    silence_compiled_torch()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from megatron_hammer.training.supervision.launcher.agent import run_agent
    from megatron_hammer.training.supervision.launcher.rendezvous import settle_rendezvous
    from megatron_hammer.training.supervision.launcher.supervisor import HangOptions

    # torchrun's own report of children that ended; what matters is printed below. Some modules have their own levels.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    received = stop_only_once()
    own, torchrun_options = read_own_options(torchrun_options)
    ours = ["--signals-to-handle", ",".join(number.name for number in list_stop_signals())]
    options = run.parse_args([*ours, *torchrun_options, "-m", TRAINING_MODULE, *training_options])
    check_numbers(options)
    check_node_rank(options)
    check_master_port(options)
    settle_rendezvous(options)
    try:
        config, entrypoint, arguments = run.config_from_args(options)
    except (ValueError, AssertionError, FileNotFoundError) as error:
        raise ConfigError(f"launch: options of torchrun must be usable, got: {error}. See torchrun --help.") from error
    timeout_s = read_collective_timeout_s(training_options)
    save = read_option(training_options, "--save")
    save_dir = None if save is None else Path(save)
    if save_dir is not None:
        refuse_pipes(save_dir, raises=ConfigError)
    # Warnings that a closed terminal does not take must not keep the launcher from starting its ranks again.
    sys.stdout, sys.stderr = lose_what_is_not_taken(sys.stdout), lose_what_is_not_taken(sys.stderr)
    grace_s = getattr(options, "shutdown_timeout", None) or CHECKPOINT_GRACE_S
    try:
        return run_agent(
            config,
            entrypoint,
            arguments,
            save_dir=save_dir,
            stop_grace_s=grace_s,
            hang_options=HangOptions(timeout_s=timeout_s, fixed_s=own.hang_timeout, ends_hangs=own.end_hangs),
        )
    except SignalException:
        return choose_exit_code(received)


def silence_compiled_torch() -> None:
    """Keep the stacks that torch's C++ prints for each lost connection off this process; its ranks log as ever.

    torch reads the variable when it is imported, and only then.
    """
    name = "TORCH_CPP_LOG_LEVEL"
    if name not in os.environ:
        os.environ[name] = "FATAL"
        import torch  # noqa: F401

        del os.environ[name]


def read_own_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the launcher that torchrun lacks, and the rest of `words`."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hang-timeout", type=float)
    parser.add_argument("--end-hangs", action="store_true")
    own, rest = parser.parse_known_args(list(words))
    if own.hang_timeout is not None and own.hang_timeout <= 0:
        raise ConfigError(
            f"hang-timeout: must be above 0 seconds, got {own.hang_timeout:g}. Leave it out for the default."
        )
    return own, rest


def check_numbers(options: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that torchrun meets with a stack trace."""
    problems = []
    if not re.fullmatch(r"[1-9]\d*|auto|cpu|gpu|xpu", str(options.nproc_per_node)):
        problems.append(
            f"nproc-per-node: must be a number above 0, or auto, gpu or cpu, got {options.nproc_per_node}. Correct it."
        )
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(options.nnodes)):
        problems.append(f"nnodes: must be a number above 0, or MIN:MAX, got {options.nnodes}. Correct it.")
    elif int(options.nnodes.split(":")[0]) > int(options.nnodes.split(":")[-1]):
        problems.append(f"nnodes: MIN must be at most MAX, got {options.nnodes}. Correct it.")
    if options.max_restarts < 0:
        problems.append(f"max-restarts: must be at least 0, got {options.max_restarts}. Use 0 for none.")
    if options.monitor_interval <= 0 or not math.isfinite(options.monitor_interval):
        problems.append(f"monitor-interval: must be above 0 seconds, got {options.monitor_interval:g}. Use 0.1.")
    if options.master_port is not None and not 0 < options.master_port < 65536:
        problems.append(f"master-port: must be 1 to 65535, got {options.master_port}. Choose a free one.")
    known = {number.name for number in signal.Signals} - {"SIGKILL", "SIGSTOP"}
    if unknown := set(options.signals_to_handle.split(",")) - known:
        problems.append(
            f"signals-to-handle: must be names of signals that can be handled, got {', '.join(sorted(unknown))}. "
            "Leave it out for those that save and stop."
        )
    if problems:
        raise ConfigError(*problems)


def read_collective_timeout_s(training_options: Sequence[str]) -> float:
    """--distributed-timeout-minutes of training, in seconds; its default where the ranks will refuse what is given."""
    try:
        minutes = float(read_option(training_options, "--distributed-timeout-minutes") or DEFAULT_TIMEOUT_MINUTES)
    except ValueError:
        minutes = math.nan
    return 60 * (minutes if minutes > 0 and math.isfinite(minutes) else DEFAULT_TIMEOUT_MINUTES)


def list_stop_signals() -> tuple[signal.Signals, ...]:
    """The signals on which a run saves and stops: STOP_SIGNALS, but not a SIGHUP that `nohup` has switched off."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (is_nohup and number == signal.SIGHUP))


def stop_only_once() -> list[signal.Signals]:
    """Have the first signal stop the run and later ones wait for it; returns the list that each one is appended to.

    At a second signal, torchrun would leave its waiting, and its end would kill processes that are still saving.
    """
    from torch.distributed.elastic.multiprocessing import api

    received: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if len(received) == 1:
            raise api.SignalException(f"got {received[0].name}", sigval=received[0])
        with contextlib.suppress(OSError):  # of a terminal that is gone
            # Not print, whose buffer the signal may have interrupted.
            os.write(2, f"still saving; to end at once, without it: kill -9 {os.getpid()}\n".encode())

    api._terminate_process_handler = stop
    return received


def choose_exit_code(received: Sequence[signal.Signals]) -> int:
    """128 + the first signal that stopped a run, as shells have it, or 0 if one of them was SIGUSR1.

    With SIGUSR1 a scheduler announces the end of a job's time. The launchers of a job end at slightly different times,
    and srun --kill-on-bad-exit would kill those that are still saving.
    """
    return 0 if not received or signal.SIGUSR1 in received else 128 + received[0]


def choose_common_exit_code(received: Sequence[signal.Signals], max_over_ranks: Callable[[float], float]) -> int:
    """As `choose_exit_code`, of the signals that any rank has got: they stop all ranks, and no launcher may take it for
    the end of the schedule. Called by every rank."""
    is_announced = max_over_ranks(float(signal.SIGUSR1 in received))
    code = max_over_ranks(float(choose_exit_code(received)))
    return 0 if is_announced else int(code)


def die_silently_of_interrupts() -> None:
    """Ctrl-C ends this process as it ends a program in C: without a stack trace, as long as nothing could be saved."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_node_rank(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number that no node has; torchrun would wait for the others until its timeout."""
    if options.rdzv_backend != "static" or options.standalone or options.rdzv_endpoint:
        return
    num_nodes = options.nnodes.split(":")[-1]  # "2", or "1:2" for at least 1
    if num_nodes.isdecimal() and not 0 <= options.node_rank < int(num_nodes):
        raise ConfigError(
            f"node-rank: must be 0 to {int(num_nodes) - 1}, got {options.node_rank} of {num_nodes} nodes. Number the "
            "nodes from 0 (NODE_RANK for the scripts)."
        )


def check_master_port(options: argparse.Namespace) -> None:
    """Raises ConfigError on node 0 if another process has its port; torchrun would end with a stack trace.

    The other nodes know the port from their own command line, so no other one can be taken in its place.
    """
    if options.rdzv_backend != "static" or options.standalone or options.rdzv_endpoint or options.node_rank != 0:
        return
    if options.master_port is None and options.nnodes in ("1", "1:1"):
        return  # torchrun then takes a free port
    port = DEFAULT_MASTER_PORT if options.master_port is None else options.master_port
    deadline_s = time.monotonic() + PORT_RELEASE_S
    while (error := try_to_listen(port)) is not None:
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"master-port: must be free on node 0, got {port}: {error.strerror}. "
                "Another run on this host may use it. Give all nodes another one (MASTER_PORT for the scripts)."
            )
        time.sleep(0.1)


def try_to_listen(port: int) -> OSError | None:
    """Why no process can listen on the port of this host, or None; it is free again afterwards."""
    has_both = socket.has_dualstack_ipv6()  # torch listens on either, so neither may be in use
    family = socket.AF_INET6 if has_both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=has_both).close()
    except OSError as error:
        return error
    return None


def end_with_launcher() -> None:
    """Have the kernel end this training process when the launcher that started it dies (Linux).

    torchrun gives every process a session of its own. So a launcher that is killed with SIGKILL, as by the kernel when
    memory runs out, would leave its processes training, beside those of the run that replaces it and into the same
    files.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


if __name__ == "__main__":
    main()
