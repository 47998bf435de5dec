"""What ranks tell rank 0, through a store that needs no collective, so that a rank which hangs can be named.

Every stage ends with a gather. A rank that does not answer in time is missing, whatever it hangs in. A rank that hangs
in native code, where Python cannot interrupt it, is ended by a thread of its own (Watch).
"""

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from megatron_hammer.errors import PlatformError

EXIT_PROBLEM = 1
# How long the other ranks leave rank 0 for its report before they end, which makes the launcher end rank 0 too.
REPORT_GRACE_S = 10.0
_ABORTED = b"aborted"


def read_place() -> tuple[str, str | None]:
    """(host of this process, the launcher's number of its node): two hosts may have one name, as containers have."""
    return socket.gethostname(), os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID")


class MissingRanksError(Exception):
    """Ranks that did not answer in a stage: the text says which. ranks: on rank 0, those that the others wait for."""

    def __init__(self, text: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.ranks = ranks


def open_store(*, rank: int, world_size: int, timeout_s: float) -> Any:
    """The store of the launcher, or rank 0's where a launcher keeps none; nobody waits for the other ranks here.

    torch.distributed.rendezvous would wait for them, and could not say who is missing. Raises PlatformError if the
    store cannot be reached in timeout_s.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return torch.distributed.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not is_served,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except torch.distributed.DistError as error:
        raise PlatformError(
            f"MASTER_ADDR: {address}:{port} must be reached in {timeout_s:.0f} s from {socket.gethostname()}, got "
            f"{str(error).splitlines()[0]}. Check the address, the port and the firewall between the hosts."
        ) from error


@dataclass(kw_only=True)
class RollCall:
    """Values of all ranks, stage by stage. Each stage has its own name, and all ranks come through in one order."""

    store: Any
    rank: int
    world_size: int
    timeout_s: float
    hosts: dict[int, str] = field(default_factory=dict)  # of the ranks that reported, on rank 0

    def __post_init__(self) -> None:
        # A connection waits with a lock held; the watching thread needs one of its own.
        self._side = self.store.clone()

    def gather(self, stage: str, value: Any) -> list[Any] | None:
        """Every rank's value (JSON) on rank 0, None on the others, all of which leave when rank 0 has them all.

        Raises MissingRanksError: on rank 0 with the ranks and hosts that did not answer in timeout_s.
        """
        self.store.set(_key(stage, self.rank), json.dumps(value))
        if self.rank != 0:
            # Rank 0 waits for every rank before it answers, so this is as long again.
            self._wait([f"{stage}/all"], 2 * self.timeout_s + REPORT_GRACE_S, stage)
            if self.store.get(f"{stage}/all") == _ABORTED:
                raise MissingRanksError(f"{stage}: rank 0 gave up")
            return None
        keys = [_key(stage, rank) for rank in range(self.world_size)]
        self._wait(keys, self.timeout_s, stage)
        values = [json.loads(text) for text in self.store.multi_get(keys)]
        self.store.set(f"{stage}/all", b"here")
        return values

    def share(self, stage: str, value: Any) -> Any:
        """Rank 0's value (JSON) on every rank."""
        if self.rank == 0:
            self.store.set(f"{stage}/shared", json.dumps(value))
        else:
            self._wait([f"{stage}/shared"], 2 * self.timeout_s, stage)
        return json.loads(self.store.get(f"{stage}/shared"))

    def _wait(self, keys: Sequence[str], timeout_s: float, stage: str) -> None:
        try:
            self.store.wait(list(keys), timedelta(seconds=timeout_s))
        except torch.distributed.DistError as error:
            if self.rank == 0:
                self.store.set(f"{stage}/all", _ABORTED)
                raise MissingRanksError(*self.find_missing(stage)) from error
            raise MissingRanksError(f"{stage}: rank 0 did not answer in {timeout_s:.0f} s") from error

    def enter(self, stage: str) -> None:
        """Note that this rank has begun the stage, which tells "hangs in it" from "never came"."""
        self.store.set(f"{stage}/{self.rank}/entered", b"")

    def find_missing(self, stage: str) -> tuple[str, list[int]]:
        """(a sentence with the ranks and hosts that have not finished the stage, the ranks that are the cause)."""
        answered = [rank for rank in range(self.world_size) if self._side.check([_key(stage, rank)])]
        missing = sorted(set(range(self.world_size)) - set(answered))
        entered = {rank for rank in missing if self._side.check([f"{stage}/{rank}/entered"])}
        never = [rank for rank in missing if rank not in entered]
        parts = []
        # Where some never came, the others wait for them: those are the cause.
        if never:
            parts.append(f"{self.name_ranks(never)} never began it")
        if entered:
            # With everybody in it, it is one of them that hangs; a collective does not show which.
            waiting = "waited in it" if never else "did not finish it"
            parts.append(f"{self.name_ranks(sorted(entered))} {waiting}")
        answers = {rank: json.loads(self._side.get(_key(stage, rank))) for rank in answered}
        parts += [
            f"{self.name_ranks([rank])} failed: {answer['error']}"
            for rank, answer in answers.items()
            if isinstance(answer, dict) and "error" in answer
        ]
        text = f"must end in {self.timeout_s:.0f} s: {'; '.join(parts) or 'all ranks have now answered'}"
        return text, never or missing

    def name_ranks(self, ranks: Sequence[int], most: int = 8) -> str:
        """'rank 3 (host b)', the first few of many."""
        unknown = "host unknown: it never reported"
        named = [f"rank {rank} ({self.hosts.get(rank, unknown)})" for rank in ranks[:most]]
        return ", ".join(named) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


class Watch:
    """A thread that acts where the main thread hangs in native code: at a deadline, and at the launcher's SIGTERM.

    on_end: called in the thread, and must not return. It gets True if the launcher ends this run.
    """

    def __init__(self, on_end: Callable[[bool], None]) -> None:
        self.on_end = on_end
        self.stage = "start"
        self._deadline_s = float("inf")
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs its own handlers in the main thread only, which may never come back from native code; the
        # interpreter's C handler writes the signal's number here at once.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._run, daemon=True).start()

    @contextlib.contextmanager
    def limit(self, stage: str, timeout_s: float) -> Iterator[None]:
        """Within the block, the main thread may take timeout_s."""
        self.stage, self._deadline_s = stage, time.monotonic() + timeout_s
        try:
            yield
        finally:
            self._deadline_s = float("inf")

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], 0.2)
            if ready and signal.SIGTERM in os.read(self._reader, 64):
                self.on_end(True)
            if time.monotonic() > self._deadline_s:
                self.on_end(False)


def _key(stage: str, rank: int) -> str:
    return f"{stage}/{rank}/value"
