"""What a launcher can still learn about a rank that has ended: from the kernel, from files, from what the rank left."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.training.supervision.launcher.exit_causes import Evidence, ShrunkFile

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class KilledCounts:
    """Processes that the kernel has killed for want of memory, since it counts. None: not readable here."""

    in_cgroup: int | None
    on_host: int | None


def read_killed_counts() -> KilledCounts:
    return KilledCounts(in_cgroup=_read_cgroup_count(), on_host=_read_count(Path("/proc/vmstat")))


def _read_cgroup_count() -> int | None:
    files = [folder / name for folder in _list_cgroups() for name in ("memory.events", "memory.oom_control")]
    return next((count for file in files if (count := _read_count(file)) is not None), None)


def _list_cgroups() -> list[Path]:
    """Folders that may be the memory cgroup of this process, the likeliest first: version 2, then version 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folders.append(_CGROUPS / path.lstrip("/"))
        elif "memory" in controllers.split(","):
            # In a container the path is that of the host, and its own root is mounted here.
            folders += [_CGROUPS / "memory" / path.lstrip("/"), _CGROUPS / "memory"]
    return [*folders, _CGROUPS]


def _read_count(path: Path) -> int | None:
    try:
        match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else int(match[1])


def read_memory_limit_bytes() -> int | None:
    """Of the cgroup; None without one below the memory of the host."""
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _list_cgroups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal() and int(text) < host_bytes:
                return int(text)
    return None


def list_mapped_files(pid: int) -> dict[Path, int]:
    """Files that a process has mapped into its memory, without its libraries, and their sizes in bytes now."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    paths = {fields[5] for line in lines if len(fields := line.split(None, 5)) == 6 and fields[5].startswith("/")}
    sizes = {}
    for path in paths:
        if re.search(r"\.so[.\d]*$", path):
            continue
        with contextlib.suppress(OSError):  # a file that is deleted
            sizes[Path(path)] = os.stat(path).st_size
    return sizes


def find_shrunk_files(sizes: dict[Path, int]) -> tuple[ShrunkFile, ...]:
    """Those of `list_mapped_files` that are shorter now, or gone."""
    shrunk = []
    for path, before_bytes in sorted(sizes.items()):
        try:
            now_bytes = path.stat().st_size
        except OSError:
            now_bytes = 0
        if now_bytes < before_bytes:
            shrunk.append(ShrunkFile(path=path, before_bytes=before_bytes, now_bytes=now_bytes))
    return tuple(shrunk)


def read_shm_free_bytes() -> int | None:
    """Room in /dev/shm, through which NCCL and data loaders pass data; None without it."""
    try:
        state = os.statvfs("/dev/shm")
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def gather_evidence(
    *, note: str | None, killed_before: KilledCounts, mapped: dict[Path, int], log_path: Path
) -> Evidence:
    """killed_before, mapped: as read while the rank still ran."""
    killed = read_killed_counts()

    def grew(now: int | None, before: int | None) -> bool:
        return now is not None and before is not None and now > before

    in_cgroup = grew(killed.in_cgroup, killed_before.in_cgroup)
    return Evidence(
        note=note,
        is_out_of_memory=in_cgroup or grew(killed.on_host, killed_before.on_host),
        memory_limit_bytes=read_memory_limit_bytes() if in_cgroup else None,
        shrunk_files=find_shrunk_files(mapped),
        shm_free_bytes=read_shm_free_bytes(),
        log_path=log_path,
    )
