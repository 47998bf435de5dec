"""torchrun's elastic agent, which starts the training processes of a node, with our rule for starting them again.

The agent and its rendezvous are torch's; what is added is judgement (restart_rule.py), a record of what happened
(events.py), and a bounded wait where torch waits for minutes.
"""

import functools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.launcher.api import LaunchConfig

from megatron_hammer.errors import USER_ERROR_EXIT_CODE
from megatron_hammer.training.supervision.events import EVENTS_FILE, EventLog
from megatron_hammer.training.supervision.exit_causes import describe_exit
from megatron_hammer.training.supervision.progress import PROGRESS_VARIABLE, find_record, read_record
from megatron_hammer.training.supervision.rendezvous import REJOIN_WAIT_S, RepeatedRendezvous, build_handler
from megatron_hammer.training.supervision.restart_rule import RestartRule
from megatron_hammer.training.supervision.resuming import continue_own_run, read_saved_step

FAILURE_GRACE_S = 15  # between SIGTERM and SIGKILL to ranks that a failed one left behind
EXIT_BARRIER_S = 30  # how long a launcher that is done waits for those of other nodes
ATTEMPT_VARIABLE = "HAMMER_ATTEMPT"
FAILURE_EXIT_CODE = 1
# Of a rank that got a signal itself, and has saved; see choose_exit_code in training/launch.py.
STOPPED_EXIT_CODES = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))


class Supervisor:
    """Judges failures of this node's ranks and writes them down.

    save_dir: of the run's checkpoints, None without.
    """

    def __init__(self, save_dir: Path | None, max_restarts: int, progress_dir: Path):
        self.save_dir, self.progress_dir = save_dir, progress_dir
        self.host = socket.gethostname()
        self.events = EventLog(None if save_dir is None else save_dir / EVENTS_FILE)
        self.first_saved_step = read_saved_step(save_dir)
        self.rule = RestartRule(max_restarts, self.first_saved_step)
        self.attempt = 0

    def begin_attempt(self, attempt: int, ranks: Sequence[int], world_size: int) -> None:
        """The ranks of this node are about to start."""
        self.attempt = attempt
        for local_rank in range(len(ranks)):
            find_record(self.progress_dir, local_rank).unlink(missing_ok=True)
        os.environ[ATTEMPT_VARIABLE] = str(attempt)
        os.environ[PROGRESS_VARIABLE] = str(self.progress_dir)
        self.events.write(
            "attempt-started",
            f"attempt {attempt}: ranks {ranks[0]} to {ranks[-1]} of {world_size} start",
            attempt=attempt,
            ranks=list(ranks),
            world_size=world_size,
            saved_step=read_saved_step(self.save_dir),
        )

    def judge(self, failures: dict[int, ProcessFailure]) -> bool:
        """Whether the ranks are to be started again, after these failures by global rank; says and records why."""
        rank, failure = find_first_failure(failures)
        if failure.exitcode in STOPPED_EXIT_CODES:
            name = signal.Signals(failure.exitcode - 128).name
            self.events.write("run-stopped", f"rank {rank} stopped after {name}", attempt=self.attempt, rank=rank)
            return False
        step, saved_step = self.read_step(), read_saved_step(self.save_dir)
        if failure.exitcode == USER_ERROR_EXIT_CODE:
            reason: str | None = "the same command would fail again"
        else:
            reason = self.rule.refuse(has_finished_step=step > 0, saved_step=saved_step)
        where = f"rank {rank} on {self.host}"
        cause = (
            f"{where} {describe_exit(failure.exitcode)}{f' after step {step}' if step else ' before its first step'}"
        )
        num_lost = max(0, step - saved_step)
        fields = {"attempt": self.attempt, "rank": rank, "exit_code": failure.exitcode}
        fields |= {"step": step, "saved_step": saved_step, "num_lost_steps": num_lost}
        self.events.write("rank-failed", cause, **fields, failed_ranks=sorted(failures))
        if failure.exitcode == USER_ERROR_EXIT_CODE:
            self.events.write("run-ended", f"not started again: {reason}", attempt=self.attempt, exit_code=2)
            return False
        print(f"error: {cause}", file=sys.stderr)
        if reason is not None:
            self.events.write("run-ended", f"not started again: {reason}", **fields)
            if self.rule.max_restarts:
                print(
                    f"error: not started again: {reason}. See {self.events.path or 'the output above'}.",
                    file=sys.stderr,
                )
            return False
        message = (
            f"restart {self.rule.num_restarts} (at most {self.rule.max_restarts}), from "
            + (f"the checkpoint of step {saved_step}" if saved_step else "the beginning")
            + (f"; {num_lost} steps run again" if num_lost else "")
        )
        print(message, file=sys.stderr)
        self.events.write("restart", message, **fields, num_restarts=self.rule.num_restarts)
        return True

    def read_step(self) -> int:
        """The last step that a rank of this node finished in this attempt; 0 for none."""
        records = [read_record(path) for path in self.progress_dir.glob("rank-*")]
        return max((record.step for record in records if record is not None), default=0)


def find_first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that is the cause of the others, by global rank.

    Their times are whole seconds, and torch has ended the remaining ranks with SIGTERM by now. A rank whose neighbour
    was killed ends with an error of its connection, so of the same second a signal counts first.
    """

    def order(rank: int) -> tuple[bool, bool, int, bool]:
        code = failures[rank].exitcode
        is_ended = code == -signal.SIGTERM or code in STOPPED_EXIT_CODES
        return code != USER_ERROR_EXIT_CODE, is_ended, failures[rank].timestamp, code >= 0

    first = min(failures, key=order)  # of equals the one that torch noticed first
    return first, failures[first]


class SupervisedAgent(LocalElasticAgent):
    """The agent of one node. stop_grace_s: for the checkpoint of a run that a signal stops."""

    _pcontext: PContext | None

    def __init__(self, supervisor: Supervisor, spec: WorkerSpec, *, stop_grace_s: float, **options: Any):
        super().__init__(spec, exit_barrier_timeout=EXIT_BARRIER_S, **options)
        self._supervisor, self._stop_grace_s = supervisor, stop_grace_s
        self._first_arguments = spec.args

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and not self._supervisor.judge(result.failures):
            self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec, supervisor = worker_group.spec, self._supervisor
        handler = spec.rdzv_handler
        attempt = handler.read_attempt() if isinstance(handler, RepeatedRendezvous) else supervisor.attempt
        ranks = [worker.global_rank for worker in worker_group.workers]
        supervisor.begin_attempt(attempt, ranks, worker_group.workers[0].world_size)
        if supervisor.save_dir is not None and read_saved_step(supervisor.save_dir) != supervisor.first_saved_step:
            spec.args = continue_own_run(self._first_arguments, supervisor.save_dir)
        pids = super()._start_workers(worker_group)
        # torch gives the other ranks of a failed one 30 s to end, wherever it ends them.
        context: Any = self._pcontext
        context.close = functools.partial(context.close, timeout=FAILURE_GRACE_S)
        return pids

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        """End the ranks. Only a run that a signal stops has a checkpoint to write; others have lost a rank."""
        is_stopped = isinstance(sys.exception(), SignalException)
        if self._pcontext is not None:
            self._pcontext.close(death_sig, timeout=int(self._stop_grace_s if is_stopped else FAILURE_GRACE_S))
        self._pcontext = None
        super()._shutdown(death_sig)


def run_agent(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    arguments: Sequence[str],
    *,
    save_dir: Path | None,
    stop_grace_s: float,
) -> int:
    """Start the ranks of this node and see them to their end, with restarts; returns the exit code.

    stop_grace_s: for the checkpoint of a run that a signal stops, which raises SignalException.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle  # read where torch starts processes
    with tempfile.TemporaryDirectory(prefix="megatron_hammer-progress-") as progress_dir:
        supervisor = Supervisor(save_dir, config.max_restarts, Path(progress_dir))
        try:
            result = _run_to_end(supervisor, config, entrypoint, arguments, stop_grace_s)
        except SignalException as stop:
            message = f"stopped by {signal.Signals(stop.sigval).name}"
            supervisor.events.write("run-stopped", message, attempt=supervisor.attempt, step=supervisor.read_step())
            raise
        except (RendezvousError, DistError) as error:
            reason = describe_rendezvous_error(error, config)
            supervisor.events.write("run-ended", reason, attempt=supervisor.attempt)
            print(f"error: {reason}", file=sys.stderr)
            return FAILURE_EXIT_CODE
        if not result.is_failed():
            supervisor.events.write("run-ended", "all ranks of this node ended well", exit_code=0)
            return 0
        code = find_first_failure(result.failures)[1].exitcode
        return code if code >= 0 else 128 - code


def _run_to_end(
    supervisor: Supervisor,
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    arguments: Sequence[str],
    stop_grace_s: float,
) -> RunResult:
    """What torch.distributed.launcher.api.launch_agent does, with our agent and rendezvous."""
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    shared = {field.name for field in fields(WorkerSpec)} & {field.name for field in fields(LaunchConfig)}
    spec = WorkerSpec(
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(arguments),
        rdzv_handler=build_handler(parameters),
        **{name: getattr(config, name) for name in shared},
    )
    agent = SupervisedAgent(
        supervisor,
        spec,
        stop_grace_s=stop_grace_s,
        logs_specs=config.logs_specs,
        start_method=config.start_method,
        log_line_prefix_template=config.log_line_prefix_template,
    )
    result = agent.run()  # a signal leaves the rendezvous open: another launcher may take this one's place
    spec.rdzv_handler.shutdown()
    return result


def describe_rendezvous_error(error: Exception, config: LaunchConfig) -> str:
    """One sentence of fact and one of remedy."""
    if isinstance(error, RendezvousClosedError):
        return "nodes: the run was ended by another node. See the output and events of that node."
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"nodes: all {config.max_nodes} must be there, got fewer within {REJOIN_WAIT_S} s after a failure or "
            f"{config.rdzv_configs['timeout']} s at the start. Start the same command on the nodes that are missing, "
            "then here."
        )
    return (
        f"nodes: the launcher of node 0 must answer at {config.rdzv_endpoint}, got no connection. Check that it runs "
        "there and that this host can reach it, then start the same command on every node."
    )
