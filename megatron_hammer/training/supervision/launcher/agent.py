"""torchrun's elastic agent, which starts the training processes of a node, with our rule for starting them again.

The agent and its rendezvous are torch's; what is added is judgement (restart_rule.py), a record of what happened
(events.py), and a bounded wait where torch waits for minutes.
"""

import contextlib
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.launcher.api import LaunchConfig

from megatron_hammer.errors import ConfigError
from megatron_hammer.training.supervision.launcher.bounded_call import call_bounded
from megatron_hammer.training.supervision.launcher.rendezvous import RepeatedRendezvous, build_handler, may_rejoin
from megatron_hammer.training.supervision.launcher.supervisor import HangOptions, Supervisor, find_first_failure
from megatron_hammer.training.supervision.resuming import continue_own_run, read_saved_step
from megatron_hammer.training.supervision.run_folder import expand_from_run

FAILURE_GRACE_S = 15  # between SIGTERM and SIGKILL to ranks that a failed one left behind
STOP_NOTICE_S = 6  # until the launchers of all nodes have read that the run ends
EXIT_BARRIER_S = 30  # how long a launcher that is done waits for those of other nodes
FAILURE_EXIT_CODE = 1
LOST_NODES = (RendezvousError, DistError, TimeoutError)


class SupervisedAgent(LocalElasticAgent):
    """The agent of one node. stop_grace_s: for the checkpoint of a run that a signal stops."""

    _pcontext: PContext | None

    def __init__(self, supervisor: Supervisor, spec: WorkerSpec, *, stop_grace_s: float, **options: Any):
        super().__init__(spec, exit_barrier_timeout=EXIT_BARRIER_S, **options)
        self._supervisor, self._stop_grace_s = supervisor, stop_grace_s
        self._first_arguments = spec.args

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and self._pcontext is not None:
            pids, store = self._pcontext.pids(), worker_group.store
            if worker_group.group_world_size == 1:
                self._supervisor.watch(pids, store)
            else:
                call_bounded(functools.partial(self._supervisor.watch, pids, store))
        if result.state == WorkerState.FAILED and not self._supervisor.judge(result.failures):
            self._remaining_restarts = 0
            if worker_group.group_world_size > 1 and self._supervisor.stop_reason is not None:
                with contextlib.suppress(*LOST_NODES):
                    code = read_exit_code(result)
                    call_bounded(functools.partial(self._supervisor.stop_others, worker_group.store, code))
                    time.sleep(STOP_NOTICE_S if worker_group.group_rank == 0 else 0)  # the store ends with node 0's
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec, supervisor = worker_group.spec, self._supervisor
        handler = spec.rdzv_handler
        attempt = handler.read_attempt() if isinstance(handler, RepeatedRendezvous) else supervisor.attempt
        ranks = [worker.global_rank for worker in worker_group.workers]
        place = worker_group.group_rank, worker_group.group_world_size
        supervisor.begin_attempt(attempt, ranks, worker_group.workers[0].world_size, *place)
        if supervisor.save_dir is not None and read_saved_step(supervisor.save_dir) != supervisor.first_saved_step:
            spec.args = build_restart(self._first_arguments, supervisor.save_dir)
        pids = super()._start_workers(worker_group)
        # torch gives the other ranks of a failed one 30 s to end, wherever it ends them.
        context: Any = self._pcontext
        context.close = functools.partial(context.close, timeout=FAILURE_GRACE_S)
        return pids

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        """End the ranks. Only a run that a signal stops has a checkpoint to write.

        Otherwise they are killed: ranks take SIGTERM for the wish to stop the whole run, also on the other nodes.
        """
        is_stopped = isinstance(sys.exception(), SignalException)
        if self._pcontext is not None:
            grace_s = int(self._stop_grace_s if is_stopped else FAILURE_GRACE_S)
            self._pcontext.close(death_sig if is_stopped else signal.SIGKILL, timeout=grace_s)
        self._pcontext = None
        super()._shutdown(death_sig)


def run_agent(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    arguments: Sequence[str],
    *,
    save_dir: Path | None,
    stop_grace_s: float,
    hang_options: HangOptions,
) -> int:
    """Start the ranks of this node and see them to their end, with restarts; returns the exit code.

    stop_grace_s: for the checkpoint of a run that a signal stops, which raises SignalException.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle  # read where torch starts processes
    with tempfile.TemporaryDirectory(prefix="megatron_hammer-progress-") as progress_dir:
        supervisor = Supervisor(save_dir, config.max_restarts, Path(progress_dir), hang_options)
        try:
            result = _run_with_reconnection(supervisor, config, entrypoint, arguments, stop_grace_s)
        except SignalException as stop:
            message = f"stopped by {signal.Signals(stop.sigval).name}"
            supervisor.events.write("run-stopped", message, attempt=supervisor.attempt, step=supervisor.read_step())
            raise
        except LOST_NODES as error:
            reason = describe_rendezvous_error(error, config)
            supervisor.events.write("run-ended", reason, attempt=supervisor.attempt)
            print(f"error: {reason}", file=sys.stderr)
            return FAILURE_EXIT_CODE
        if not result.is_failed():
            supervisor.events.write("run-ended", "all ranks of this node ended well", exit_code=0)
            return 0
        return read_exit_code(result) if supervisor.others_exit_code is None else supervisor.others_exit_code


def build_restart(arguments: Sequence[str], save_dir: Path) -> tuple[str, ...]:
    """Python's arguments with which ranks resume from `save_dir`. arguments: [-u, -m, module, argument, ...]."""
    own = arguments.index("-m") + 2
    # A run that --from-run repeats may have begun with another run's checkpoint.
    return (*arguments[:own], *continue_own_run(expand_from_run(arguments[own:]), save_dir))


def read_exit_code(result: RunResult) -> int:
    """Of the rank that failed first, as shells have it."""
    code = find_first_failure(result.failures)[1].exitcode
    return code if code >= 0 else 128 - code


def _run_with_reconnection(
    supervisor: Supervisor,
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    arguments: Sequence[str],
    stop_grace_s: float,
) -> RunResult:
    """`_run_to_end`, again while node 0's launcher is lost and comes back."""
    is_rejoining = False
    while True:
        try:
            return _run_to_end(supervisor, config, entrypoint, arguments, stop_grace_s, is_rejoining)
        except LOST_NODES as error:
            if not may_rejoin(error, config.rdzv_configs) or not supervisor.lose_first_node():
                raise
            is_rejoining = True


def _run_to_end(
    supervisor: Supervisor,
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    arguments: Sequence[str],
    stop_grace_s: float,
    is_rejoining: bool,
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
    try:
        handler = build_handler(parameters, is_rejoining=is_rejoining)
    except ValueError as error:
        raise ConfigError(f"rdzv-conf: settings of the rendezvous must be usable, got: {error} Correct it.") from error
    shared = {field.name for field in fields(WorkerSpec)} & {field.name for field in fields(LaunchConfig)}
    spec = WorkerSpec(
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(arguments),
        rdzv_handler=handler,
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
    try:
        result = agent.run()  # a signal leaves the rendezvous open: another launcher may take this one's place
        spec.rdzv_handler.shutdown()
    except LOST_NODES:
        if isinstance(spec.rdzv_handler, RepeatedRendezvous):
            spec.rdzv_handler.abandon()
        raise
    return result


def describe_rendezvous_error(error: Exception, config: LaunchConfig) -> str:
    """One sentence of fact and one of remedy."""
    if isinstance(error, RendezvousClosedError):
        return "nodes: the run was ended by another node. See the output and events of that node."
    if isinstance(error, RendezvousTimeoutError):
        return str(error)
    return (
        f"nodes: the launcher of node 0 must answer at {config.rdzv_endpoint}, got no connection. Check that it runs "
        "there and that this host can reach it, then start the same command on every node."
    )
