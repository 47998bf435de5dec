"""Judges failures of one node's ranks: what happened, why, what was lost, and whether the ranks start again."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_hammer.errors import USER_ERROR_EXIT_CODE
from megatron_hammer.training.supervision.last_words import find_note, read_note
from megatron_hammer.training.supervision.launcher.events import EVENTS_FILE, EventLog
from megatron_hammer.training.supervision.launcher.exit_causes import describe_exit, explain_exit
from megatron_hammer.training.supervision.launcher.exit_evidence import (
    KilledCounts,
    gather_evidence,
    list_mapped_files,
    read_killed_counts,
)
from megatron_hammer.training.supervision.launcher.hangs import Hang, HangLimit
from megatron_hammer.training.supervision.launcher.restart_rule import RestartRule
from megatron_hammer.training.supervision.launcher.watch import Place, RunWatch, Store, describe_hang
from megatron_hammer.training.supervision.log_folder import LOG_DIR_VARIABLE, find_log, find_log_dir
from megatron_hammer.training.supervision.progress import (
    ATTEMPT_VARIABLE,
    PROGRESS_VARIABLE,
    RankProgress,
    find_record,
    read_record,
)
from megatron_hammer.training.supervision.resuming import read_saved_step

MAPPED_FILES_INTERVAL_S = 60.0
# Of a rank that got a signal itself, and has saved; see choose_exit_code in training/launch.py.
STOPPED_EXIT_CODES = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))


@dataclass(frozen=True, kw_only=True, slots=True)
class HangOptions:
    """timeout_s: of the run's collectives. fixed_s: a limit of the user's. ends_hangs: see RunWatch."""

    timeout_s: float
    fixed_s: float | None
    ends_hangs: bool


class Failure(Protocol):
    """What is read of torch's ProcessFailure."""

    local_rank: int
    exitcode: int
    timestamp: int


class Supervisor:
    """save_dir: of the run's checkpoints, None without. progress_dir: of the records that this node's ranks keep."""

    def __init__(self, save_dir: Path | None, max_restarts: int, progress_dir: Path, hang_options: HangOptions):
        self.save_dir, self.progress_dir = save_dir, progress_dir
        self.host = socket.gethostname()
        if save_dir is None:
            os.environ[LOG_DIR_VARIABLE] = tempfile.mkdtemp(prefix=f"megatron_hammer-{os.getuid()}-")
        self.log_dir = find_log_dir(save_dir)
        self.events = EventLog(None if save_dir is None else save_dir / EVENTS_FILE)
        self.first_saved_step = read_saved_step(save_dir)
        self.rule = RestartRule(max_restarts, self.first_saved_step)
        self.attempt = 0
        self._ranks: Sequence[int] = ()
        self._hang_options = hang_options
        self._watch: RunWatch | None = None
        self._ended_because: str | None = None
        self.others_exit_code: int | None = None  # of the node that has ended the run
        self.stop_reason: str | None = None  # why the run ends, for the other nodes; None where they need not hear it
        self._killed: KilledCounts = read_killed_counts()
        self._mapped: dict[int, dict[Path, int]] = {}  # by local rank
        self._mapped_at_s = 0.0

    # --- called by the agent -----------------------------------------------------------------------------------------

    def begin_attempt(self, attempt: int, ranks: Sequence[int], world_size: int, node: int, num_nodes: int) -> None:
        """The ranks of this node, by global number, are about to start."""
        options = self._hang_options
        self._ended_because, self.others_exit_code, self.stop_reason = None, None, None
        self._watch = RunWatch(
            Place(node=node, num_nodes=num_nodes, host=self.host, ranks=ranks),
            self.read_records,
            HangLimit(options.timeout_s, options.fixed_s),
            self._report_hang,
            self._note_reason,
            ends_hangs=options.ends_hangs,
        )
        self.attempt, self._ranks = attempt, ranks
        self._killed, self._mapped, self._mapped_at_s = read_killed_counts(), {}, 0.0
        for local_rank in range(len(ranks)):
            find_record(self.progress_dir, local_rank).unlink(missing_ok=True)
            find_note(self.progress_dir, local_rank).unlink(missing_ok=True)
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

    def watch(self, pids: Mapping[int, int], store: Store) -> None:
        """Look after running ranks, by local rank; called many times per second. store: shared by all launchers."""
        assert self._watch is not None
        self._watch.look(pids, store)
        now_s = time.monotonic()
        is_due = now_s - self._mapped_at_s > MAPPED_FILES_INTERVAL_S
        if is_due and self.read_step():  # by then a rank has opened its data
            self._mapped_at_s = now_s
            self._mapped = {local_rank: list_mapped_files(pid) for local_rank, pid in pids.items()}

    def judge(self, failures: Mapping[int, Failure]) -> bool:
        """Whether the ranks are to be started again, after these failures by global rank; says and records why."""
        rank, failure = find_first_failure(failures)
        code = failure.exitcode
        if code in STOPPED_EXIT_CODES:
            name = signal.Signals(code - 128).name
            self.events.write("run-stopped", f"rank {rank} stopped after {name}", attempt=self.attempt, rank=rank)
            return False
        step, saved_step = self.read_step(), read_saved_step(self.save_dir)
        fields = {"attempt": self.attempt, "rank": rank, "exit_code": code}
        fields |= {"step": step, "saved_step": saved_step, "num_lost_steps": max(0, step - saved_step)}
        fact, cause = self._explain(rank, failure, step)
        self.events.write("rank-failed", f"{fact}. {cause}", **fields, failed_ranks=sorted(failures))
        if code == USER_ERROR_EXIT_CODE:  # the rank has said it on the terminal
            self._end_run("the same command would fail again", fields)
            self.stop_reason = f"{fact}: {cause}"
            return False
        print(f"error: {fact}. {cause}", file=sys.stderr)
        if self.others_exit_code is not None:
            self._end_run("another node has ended the run", fields)
            return False
        reason = self.rule.refuse(has_finished_step=step > 0, saved_step=saved_step)
        if reason is not None:
            self._end_run(reason, fields)
            self.stop_reason = f"{fact}, and it was not started again: {reason}"
            if self.rule.max_restarts:
                print(f"error: not started again: {reason}.", file=sys.stderr)
            return False
        message = self._describe_restart(saved_step, fields["num_lost_steps"])
        print(message, file=sys.stderr)
        self.events.write("restart", message, **fields, num_restarts=self.rule.num_restarts)
        return True

    def stop_others(self, store: Store, exit_code: int) -> None:
        """Tell the other nodes that the run ends, and why."""
        if self._watch is not None and self.stop_reason is not None:
            self._watch.stop_all(store, self.stop_reason, exit_code)

    def lose_first_node(self) -> bool:
        """Node 0's launcher does not answer. Whether to wait for it, as for any restart; its ranks have ended here."""
        if self._watch is None:
            return False  # no attempt since it was lost
        self._watch = None
        step, saved_step = self.read_step(), read_saved_step(self.save_dir)
        reason = self.rule.refuse(has_finished_step=step > 0, saved_step=saved_step)
        message = "the launcher of node 0 does not answer" + ("; waiting for it" if reason is None else "")
        print(f"error: {message}.", file=sys.stderr)
        fields = {"attempt": self.attempt, "step": step, "saved_step": saved_step}
        self.events.write("node-lost", message, **fields, num_lost_steps=max(0, step - saved_step))
        return reason is None

    # --- what the records say ----------------------------------------------------------------------------------------

    def read_records(self) -> dict[int, RankProgress]:
        """Of this node's ranks, by local rank, as far as they have begun one."""
        records = {local: read_record(find_record(self.progress_dir, local)) for local in range(len(self._ranks))}
        return {local: record for local, record in records.items() if record is not None}

    def read_step(self) -> int:
        """The last step that a rank of this node finished in this attempt; 0 for none."""
        return max((record.step for record in self.read_records().values()), default=0)

    def _explain(self, rank: int, failure: Failure, step: int) -> tuple[str, str]:
        """(what happened, why and what to do)."""
        if self._ended_because is not None:
            return f"attempt {self.attempt} was ended on {self.host} after step {step}", f"{self._ended_because}."
        evidence = gather_evidence(
            note=read_note(self.progress_dir, failure.local_rank),
            killed_before=self._killed,
            mapped=self._mapped.get(failure.local_rank, {}),
            log_path=find_log(self.log_dir, rank),
        )
        record = self.read_records().get(failure.local_rank)
        when = f"after step {step}" if step else "before its first step"
        phase = "" if record is None else f", {record.phase}"
        fact = f"rank {rank} on {self.host} {describe_exit(failure.exitcode)} {when}{phase}"
        return fact, explain_exit(failure.exitcode, evidence)

    def _report_hang(self, hang: Hang) -> None:
        print(f"warning: {hang.message}.", file=sys.stderr)
        self.events.write("hang", hang.message, attempt=self.attempt, **describe_hang(hang))

    def _note_reason(self, reason: str, exit_code: int | None) -> None:
        """The ranks of this node are about to be killed for it. exit_code: of another node, which has ended the run."""
        self._ended_because, self.others_exit_code = reason, exit_code

    def _describe_restart(self, saved_step: int, num_lost: int) -> str:
        return (
            f"restart {self.rule.num_restarts} (at most {self.rule.max_restarts}), from "
            + (f"the checkpoint of step {saved_step}" if saved_step else "the beginning")
            + (f"; {num_lost} steps run again" if num_lost else "")
        )

    def _end_run(self, reason: str, fields: Mapping[str, int]) -> None:
        self.events.write("run-ended", f"not started again: {reason}", **fields)


def find_first_failure(failures: Mapping[int, Failure]) -> tuple[int, Failure]:
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
