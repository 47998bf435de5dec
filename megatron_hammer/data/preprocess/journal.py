"""What an unfinished run has done, on disk, so that the same command can continue after a kill at any point.

The journal is replaced as a whole, and only after the data that it counts is on the disk. It also holds the options and
inputs of the run: a run that would give other bytes is refused, and each difference is named. --workers and
--max-errors may change between runs, so they are not recorded.
"""

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_hammer.corpus.blocks import Position
from megatron_hammer.data.indexed.manifest import JobShard, Manifest, show_option
from megatron_hammer.data.indexed.pair_writer import WriterState
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import cannot_write, publish_files
from megatron_hammer.files.typed import FormatVersion, read_json

FORMAT_VERSION = 2  # 2: inputs are recorded by their real paths
# With another folder as input, thousands of files differ.
MAX_DIFFERENCES_SHOWN = 20

Phase = Literal["encode", "shuffle", "publish"]


@dataclass(frozen=True, slots=True)
class InputState:
    """An input file as it was found; a change of any of these means that its content may have changed.

    path: the real one, so that the command can be repeated with another spelling of it.
    """

    path: str
    size_bytes: int
    modified_ns: int

    @staticmethod
    def of(path: Path) -> "InputState":
        status = path.stat()
        return InputState(os.path.realpath(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that shapes the bytes of a run; flags by their names."""

    flags: dict[str, Any]
    tokenizer_sha256: str
    shard: JobShard | None
    inputs: tuple[InputState, ...]
    tool_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """The job and how far it has come; lists follow the JSON keys.

    encode: everything before `position` is in the writers. shuffle: everything is, in the order of the input, and is
    to be shuffled. publish: everything is in the final writers, and `manifests` describe it.
    """

    job: Job
    phase: Phase
    position: Position
    writers: tuple[WriterState, ...]
    text_bytes: tuple[int, ...]
    num_empty_documents: tuple[int, ...]
    problems: tuple[str, ...]
    manifests: tuple[Manifest, ...] = ()
    format_version: int = FORMAT_VERSION


def write_journal(path: Path, journal: Journal) -> None:
    """Replace the journal; after a kill there is the old one or the new one."""
    # Not dataclasses.asdict: it copies the state of every input file, and there may be many thousands.
    fields = {field.name: getattr(journal, field.name) for field in dataclasses.fields(journal)}
    publish_files({path: orjson.dumps(fields)})


def read_journal(path: Path) -> Journal | None:
    """Return the journal, or None if there is none; raises DataError if it is damaged or of another version."""
    if not path.exists():
        return None
    remedy = "It is no journal of an unfinished run; pass --restart to throw that run away and begin again."
    # Any other version, not only a later one: a journal is continued by the version that began it.
    version = read_json(path, FormatVersion, remedy=remedy).format_version
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {version}, of another version of this tool. "
            "Finish the run with that version, or pass --restart to throw it away and begin again."
        )
    return read_json(path, Journal, remedy=remedy)


def refuse_other_job(path: Path, begun: Job, asked: Job) -> None:
    """Raise DataError naming everything in which the job that is asked for differs from the one that was begun."""
    differences = [*_compare_inputs(begun.inputs, asked.inputs), *_compare_options(begun, asked)]
    if differences:
        more = len(differences) - MAX_DIFFERENCES_SHOWN
        raise DataError(
            *differences[:MAX_DIFFERENCES_SHOWN],
            *([f"inputs and flags: {more} more of them changed."] if more > 0 else []),
            f"{path}: an unfinished run can only be continued as it was begun. "
            "Undo what changed, or pass --restart to throw that run away and begin again.",
        )


@contextmanager
def lock_outputs(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends; raises DataError if another process has it.

    Raises OutputError if the file of the lock cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            # Before the lock ends: after it, another run may hold this very file.
            path.unlink()
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not the existence of the file: the system drops this lock when its owner dies, however it dies.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # The owner has written its process and machine into the file, for this message.
            owner = os.read(descriptor, 100).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise DataError(
                f"{path}: another run is writing this output, got process {owner}. "
                "Wait for it to end, or pass another --output-prefix."
            ) from error
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                # A killed owner leaves its file, with its own number in it.
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} on {os.uname().nodename}".encode())
                return descriptor
        os.close(descriptor)  # its owner removed the file between our open and our lock


def _compare_inputs(begun: tuple[InputState, ...], asked: tuple[InputState, ...]) -> list[str]:
    old = {state.path: state for state in begun}
    new = {state.path: state for state in asked}
    differences = [f"{path}: input must be as when the run began, got a new file." for path in new if path not in old]
    differences += [f"{path}: input must be as when the run began, got none." for path in old if path not in new]
    for path in old.keys() & new.keys():
        if old[path].size_bytes != new[path].size_bytes:
            change = f"{new[path].size_bytes} bytes where there were {old[path].size_bytes}"
            differences.append(f"{path}: input must be as when the run began, got {change}.")
        # The size is equal, so only the time of the last change differs.
        elif old[path] != new[path]:
            differences.append(f"{path}: input must be as when the run began, got one that was modified since.")
    if not differences and begun != asked:
        differences.append("input: files must come in the same order as when the run began, got another order.")
    return sorted(differences)


def _compare_options(begun: Job, asked: Job) -> list[str]:
    old, new = (
        {"tokenizer-model": job.tokenizer_sha256, "tool version": job.tool_version}
        | {"shard": None if job.shard is None else f"{job.shard.index}/{job.shard.count}"}
        | {name.replace("_", "-"): value for name, value in job.flags.items()}
        for job in (begun, asked)
    )
    return [
        f"{name}: must be as when the run began, got {show_option(new.get(name))} "
        f"where it was {show_option(old.get(name))}."
        for name in new | old
        if old.get(name) != new.get(name)
    ]
