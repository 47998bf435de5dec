import mmap
import os
from pathlib import Path

from megatron_hammer.training.supervision.launcher import exit_evidence
from megatron_hammer.training.supervision.launcher.exit_evidence import KilledCounts, find_shrunk_files, gather_evidence


def test_mapped_files_that_become_shorter_are_found(tmp_path: Path) -> None:
    kept, cut, gone = (tmp_path / name for name in ("kept", "cut with spaces", "gone"))
    maps = []
    for path in (kept, cut, gone):
        path.write_bytes(b"x" * 9000)
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    sizes = exit_evidence.list_mapped_files(os.getpid())
    assert {path: sizes[path] for path in (kept, cut, gone)} == {kept: 9000, cut: 9000, gone: 9000}
    assert not any(".so" in path.suffixes for path in sizes)
    os.truncate(cut, 10)
    gone.unlink()
    shrunk = find_shrunk_files({path: sizes[path] for path in (kept, cut, gone)})
    assert [(file.path, file.now_bytes) for file in shrunk] == [(cut, 10), (gone, 0)]


def test_a_process_that_has_ended_maps_nothing() -> None:
    assert exit_evidence.list_mapped_files(2**22 + 1) == {}


def test_only_kills_during_the_attempt_are_a_cause(tmp_path: Path, monkeypatch) -> None:
    counts = iter([KilledCounts(in_cgroup=3, on_host=7), KilledCounts(in_cgroup=3, on_host=8)])
    monkeypatch.setattr(exit_evidence, "read_killed_counts", lambda: next(counts))
    before = KilledCounts(in_cgroup=3, on_host=7)
    found = [gather_evidence(note=None, killed_before=before, mapped={}, log_path=tmp_path) for _ in range(2)]
    assert [evidence.is_out_of_memory for evidence in found] == [False, True]
    assert found[1].memory_limit_bytes is None, "the host was full, not the cgroup"


def test_what_the_kernel_does_not_say_is_no_cause(tmp_path: Path, monkeypatch) -> None:
    unknown = KilledCounts(in_cgroup=None, on_host=None)
    monkeypatch.setattr(exit_evidence, "read_killed_counts", lambda: unknown)
    assert not gather_evidence(note=None, killed_before=unknown, mapped={}, log_path=tmp_path).is_out_of_memory
