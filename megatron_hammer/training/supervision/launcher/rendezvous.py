"""How the launchers of a run find each other, so that they also find each other again after a failure.

torchrun's static rendezvous (--node-rank, --master-addr) happens once: after a failure on one node the others never
hear of it. So its options are read as torchrun's dynamic rendezvous (c10d), held by node 0 at the same address and
port, with nodes numbered as the user numbers them. A run on one node takes it as torchrun --standalone does.
"""

import argparse
import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    RendezvousTimeout,
    _BackendRendezvousStateHolder,
    create_handler,
)

from megatron_hammer.training.supervision.launcher.bounded_call import STORE_SILENCE_S, call_bounded

FIRST_WAIT_S = 600  # for all nodes at the start of a run; torchrun's own
REJOIN_WAIT_S = 60  # for a node that was lost; its launcher's silence alone takes 15 s to notice
# Settings of a rendezvous (--rdzv-conf), the last two ours.
_FIRST_WAIT, _REJOIN_WAIT, _NODE_RANK = "join_timeout", "rejoin_timeout", "node_rank"


@dataclasses.dataclass(eq=True, order=True, frozen=True)
class NumberedNode:
    """In the place of torch's own description of a node, whose order, by address, would number the ranks."""

    node_rank: int
    addr: str
    pid: int
    local_id: int

    def __repr__(self) -> str:
        return f"node {self.node_rank} ({self.addr}, process {self.pid})"


class ObservedHeartbeats(_BackendRendezvousStateHolder):
    """Takes a node for lost when its heartbeat has not changed for as long as torch allows, by this host's own clock.

    torch compares the dates that hosts write: where the date of one is off by 15 s, or jumps, its node counts as lost,
    and the next attempt begins with the other nodes alone. own: the node of this launcher.
    """

    def __init__(self, backend: Any, settings: RendezvousSettings, own: Any):
        super().__init__(backend, settings)
        self._own = own
        self._observed: dict[Any, tuple[datetime, float]] = {}  # a heartbeat, and when it was first seen

    def _sanitize(self) -> None:
        now, now_s = datetime.now(UTC), time.monotonic()
        written = self._state.last_heartbeats
        self._observed = {
            node: self._observed[node] if self._observed.get(node, (None,))[0] == beat else (beat, now_s)
            for node, beat in written.items()
        }
        self._state.last_heartbeats = {
            node: now - timedelta(seconds=now_s - seen_at_s) for node, (_, seen_at_s) in self._observed.items()
        }
        super()._sanitize()
        self._state.last_heartbeats = {node: written[node] for node in self._state.last_heartbeats}
        if written.get(self._own, now) > now:  # the date went back: torch would not write the next heartbeat until then
            self._state.last_heartbeats[self._own] = now - self._settings.keep_alive_interval


class RepeatedRendezvous(DynamicRendezvousHandler):
    """Gives every attempt a store of its own for its process groups, and waits a bounded time for lost nodes.

    torch keeps one store for all attempts of a launcher: the ranks of a second attempt read there the addresses of the
    first one's ranks, and no restart succeeds (DynamicRendezvousHandler.next_rendezvous of torch 2.15).
    """

    num_rounds = 0
    rejoin_wait_s = REJOIN_WAIT_S
    _asked_at_s = 0.0
    _num_waiting = 0
    _settings: RendezvousSettings
    _shared_tcp_store_server: Any
    _keep_alive_timer: Any

    def next_rendezvous(self) -> RendezvousInfo:
        former = self._shared_tcp_store_server  # it must live until the ranks that use it are gone
        self._shared_tcp_store_server = self._bootstrap_store_info = None
        timeouts = self._settings.timeout
        if self.num_rounds:
            bounded = RendezvousTimeout(timedelta(seconds=self.rejoin_wait_s), timeouts.last_call, timeouts.close)
            self._settings = dataclasses.replace(self._settings, timeout=bounded)
        try:
            info = super().next_rendezvous()
        except RendezvousTimeoutError:
            raise RendezvousTimeoutError(self._describe_missing()) from None
        self.num_rounds += 1
        del former
        return info

    def num_nodes_waiting(self) -> int:
        """As torch's, which asks the store ten times per second and may wait for it without end."""
        now_s = time.monotonic()
        if now_s - self._asked_at_s >= 1.0:
            self._asked_at_s = now_s
            try:
                self._num_waiting = call_bounded(super().num_nodes_waiting)
            except TimeoutError as error:
                raise RendezvousConnectionError(str(error)) from None
        return self._num_waiting

    def abandon(self) -> None:
        """Stop its heartbeats, without the wait that torch has for one that gets no answer.

        torch waits for their thread also when the handler is collected, which may happen in that thread itself.
        """
        if self._keep_alive_timer is not None:
            self._keep_alive_timer._ctx.stop_event.set()
            self._keep_alive_timer._finalizer.detach()

    def _describe_missing(self) -> str:
        waited_s = self._settings.timeout.join.total_seconds()
        present = {*self._state_holder.state.participants, *self._state_holder.state.wait_list, self._this_node}
        fact = f"nodes: all {self._settings.max_nodes} must be there, got {len(present)} within {waited_s:.0f} s"
        if isinstance(self._this_node, NumberedNode):
            missing = set(range(self._settings.max_nodes)) - {getattr(node, "node_rank", None) for node in present}
            fact += f": missing node {', '.join(map(str, sorted(missing)))}"
        return f"{fact}. Start the same command there, then here again."

    def read_attempt(self) -> int:
        """Number of the present attempt, from 0; the same on all nodes, also on one that joined later."""
        return self._state_holder.state.round


def settle_rendezvous(options: argparse.Namespace) -> None:
    """Replace torchrun's static rendezvous in `options`, as parsed by torch.distributed.run.parse_args."""
    is_alone = options.nnodes in ("1", "1:1") and not options.rdzv_endpoint and options.master_port is None
    if options.standalone or (options.rdzv_backend == "static" and is_alone):
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
        # torch takes the host's name, which need not resolve where a run on one node is all that is wanted.
        options.local_addr = options.local_addr or "localhost"
    elif options.rdzv_backend == "static":
        port = 29500 if options.master_port is None else options.master_port
        options.rdzv_endpoint = options.rdzv_endpoint or f"{options.master_addr}:{port}"
        options.rdzv_backend = "c10d"
        is_host = options.node_rank == 0
        own = f"read_timeout={STORE_SILENCE_S:.0f}"  # first, so that the user's own wins
        settings = [own, options.rdzv_conf, f"is_host={is_host}", f"{_NODE_RANK}={options.node_rank}"]
        options.rdzv_conf = ",".join(setting for setting in settings if setting)
        # Node 0's address must be the one under which the others know it.
        options.local_addr = options.local_addr or (options.master_addr if is_host else None)
        options.node_rank = 0  # else torchrun warns that it is ignored
    if options.master_port is None:
        options.master_port = 29500


def build_handler(parameters: RendezvousParameters, *, is_rejoining: bool = False) -> RendezvousHandler:
    """The handler of a launcher. Raises RendezvousConnectionError if node 0's does not answer in time.

    is_rejoining: whether this launcher has lost node 0's, and waits for it as for any lost node.
    """
    if parameters.backend != "c10d":
        # etcd: the remedy for shared stores that torch has; see RepeatedRendezvous.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        return rendezvous_handler_registry.create_handler(parameters)
    rejoin_wait_s = parameters.get_as_int(_REJOIN_WAIT) or REJOIN_WAIT_S
    if is_rejoining:
        parameters.config[_FIRST_WAIT] = rejoin_wait_s
    backend, store = _connect(parameters)
    handler = create_handler(store, backend, parameters)
    node: Any = handler._this_node
    node_rank = parameters.get_as_int(_NODE_RANK)
    if node_rank is not None:
        address = parameters.local_addr or find_own_address(parameters.endpoint)
        node = NumberedNode(node_rank, address, node.pid, node.local_id)
    heartbeats = ObservedHeartbeats(backend, handler.settings, node)
    repeated = RepeatedRendezvous(node, handler.settings, backend.name, store, heartbeats)
    repeated.rejoin_wait_s = rejoin_wait_s
    return repeated


def _connect(parameters: RendezvousParameters) -> tuple[Any, Any]:
    """torch's create_backend, repeated until node 0's launcher is there: nodes need not start at the same time."""
    deadline_s = time.monotonic() + (parameters.get_as_int(_FIRST_WAIT) or FIRST_WAIT_S)
    while True:
        try:
            return create_backend(parameters)
        except RendezvousConnectionError:
            if parameters.get_as_bool("is_host") or time.monotonic() > deadline_s:
                raise
            time.sleep(1)


def may_rejoin(error: Exception, rdzv_configs: Mapping[str, Any]) -> bool:
    """Whether only the connection to node 0's launcher is lost, which may come back. rdzv_configs: of this launcher."""
    is_numbered = int(rdzv_configs.get(_NODE_RANK, 0)) > 0
    return is_numbered and isinstance(error, RendezvousConnectionError | DistError | TimeoutError)


def find_own_address(endpoint: str) -> str:
    """The address under which this host reaches `endpoint` ("host:port"), and so is reached from there."""
    host, _, port = endpoint.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # UDP: nothing is sent
        return str(probe.getsockname()[0])
