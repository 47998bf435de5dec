"""One run at a time writes in --save: the file `run.lock` there names it. No torch.

Rank 0 holds a kernel lock (flock) on the file, which ends with its process however that ends, and a thread of it gives
a sign every few seconds by the file's time. The kernel lock decides on one host. Between hosts, whose file system may
not share it, or may keep that of a lost host for minutes, the signs decide: without one for SILENCE_S the run is dead.
So no lock outlives its process on the same host, and none blocks a run on another host for long.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import cannot_write

LOCK_FILE = "run.lock"
SIGN_INTERVAL_S = 5.0
SILENCE_S = 30.0  # how long a run of another host is watched before it counts as dead
RELEASE_S = 10.0  # how long a large process that was killed may take to end
JOB_VARIABLES = ("SLURM_JOB_ID", "JOB_NAME", "PBS_JOBID", "LSB_JOBID")


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who writes. process_started: in clock ticks since boot. namespace: of process ids, which containers have."""

    host: str
    boot: str
    namespace: str
    process: int
    process_started: str
    job: str
    since: str


def describe_this_process() -> Holder:
    namespace, boot = "", ""
    with contextlib.suppress(OSError):  # not Linux
        namespace = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Holder(
        host=socket.gethostname(),
        boot=boot,
        namespace=namespace,
        process=os.getpid(),
        process_started=read_start(os.getpid()) or "",
        job=next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), ""),
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def read_start(process: int) -> str | None:
    """When a process started, so that a later one with the same number is another; None if there is none."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # after the name, which may hold spaces
    return None if fields[0] in "ZX" else fields[19]


class RunLock:
    """The right to write in a folder, from its making to `release()` or the end of the process.

    Raises ConfigError if another run has it, OutputError if the folder cannot be written.
    """

    def __init__(self, save_dir: Path):
        self.path = save_dir / LOCK_FILE
        self.holder = describe_this_process()
        try:
            save_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            self._wait_until_free()
        except BaseException:
            os.close(self._file)
            raise
        self._write(json.dumps(asdict(self.holder)).encode())
        self._is_over = threading.Event()
        threading.Thread(target=self._give_signs, name="run lock", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken it, as where this host was cut off. A folder that is gone is no loss."""
        try:
            return read_holder(self.path) not in (self.holder, None)
        except OSError:
            return False

    def release(self) -> None:
        """Let the next run write; nothing happens if the lock is lost."""
        self._is_over.set()
        if not self.is_lost:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
        os.close(self._file)

    def _wait_until_free(self) -> None:
        """Take the kernel lock, or see that its holder on another host gives no sign. Raises ConfigError."""
        started_at_s, first_sign = time.monotonic(), self._read_sign()
        while True:
            has_lock, other = self._try_lock(), read_holder(self.path)
            waited_s, is_silent = time.monotonic() - started_at_s, self._read_sign() == first_sign
            if other is None or self._is_here(other):
                if has_lock and not (other is not None and is_alive(other)):
                    return
                is_refused = waited_s >= RELEASE_S
            else:
                if is_silent and waited_s >= SILENCE_S:
                    return
                is_refused = not is_silent
            if is_refused:
                raise ConfigError(self._refuse(other))
            time.sleep(0.2)

    def _is_here(self, other: Holder) -> bool:
        """Whether its process, or the lack of it, can be seen from here; after a reboot there is none."""
        is_same_host = other.host == self.holder.host
        return is_same_host and (other.boot != self.holder.boot or other.namespace == self.holder.namespace)

    def _try_lock(self) -> bool:
        """True also where the file system has no locks: the signs alone decide there."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _read_sign(self) -> int:
        # Opened anew: NFS asks its server only then.
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _write(self, content: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)
        os.fsync(self._file)

    def _give_signs(self) -> None:
        while not self._is_over.wait(SIGN_INTERVAL_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _refuse(self, other: Holder | None) -> str:
        who = "another run"
        if other is not None:
            job = f", job {other.job}" if other.job else ""
            who = f"process {other.process} on host {other.host}{job}, since {other.since}"
        return (
            f"save: must be written by one run at a time, got {self.path.parent}, in which {who}, writes. "
            "Stop that run or wait for its end, or pass another --save."
        )


def is_alive(holder: Holder) -> bool:
    """Whether a process of this host and namespace still runs."""
    is_this_boot = holder.boot == describe_this_process().boot
    return is_this_boot and read_start(holder.process) == holder.process_started and holder.process != os.getpid()


def read_holder(path: Path) -> Holder | None:
    """Whom a lock file names; None if nobody, or if it is not whole."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return None
