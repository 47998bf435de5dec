import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hammer.errors import OutputError
from megatron_hammer.training.saving import failures


def plan_of(save: Path) -> SimpleNamespace:
    return SimpleNamespace(checkpoints=SimpleNamespace(save=str(save)))


def test_what_each_rank_said_is_in_one_sentence(tmp_path: Path) -> None:
    of_ranks = {3: (RuntimeError("Worker failure: a/__3_0.distcp on host h: Disk quota exceeded"), None)}
    of_ranks |= {1: (ValueError("odd"), None)}
    (problem,) = failures.explain(SimpleNamespace(failures=of_ranks), plan_of(tmp_path)).problems  # type: ignore
    assert "rank 1: ValueError: odd; rank 3: a/__3_0.distcp on host h: Disk quota exceeded" in problem
    (elsewhere,) = failures.explain(SimpleNamespace(failures={}), plan_of(tmp_path)).problems  # type: ignore
    assert "got a failure that rank 0 names" in elsewhere


def test_an_error_without_a_file_names_the_folder(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert f"got {tmp_path}: No space left on device" in str(failures.explain(error, plan_of(tmp_path)))


def test_a_folder_without_room_or_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "new"
    monkeypatch.setattr(failures, "count_needed_bytes", lambda plan, save_dir: 1)
    failures.require_room(plan_of(save))  # type: ignore[arg-type]
    assert list(save.iterdir()) == []
    monkeypatch.setattr(failures, "count_needed_bytes", lambda plan, save_dir: 1 << 62)
    with pytest.raises(OutputError, match=r"save: must have room for a checkpoint of 4294967296\.0 GiB"):
        failures.require_room(plan_of(save))  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: (File exists|Not a directory)"):
        failures.require_room(plan_of(tmp_path / "file"))  # type: ignore[arg-type]
