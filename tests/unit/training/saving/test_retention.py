import os
import shutil
import threading
from pathlib import Path

import pytest

from megatron_hammer.checkpoint_files import iterations
from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import write_hashes
from megatron_hammer.training.saving import retention
from megatron_hammer.training.saving.retention import (
    Retainer,
    Retention,
    is_own,
    read_rule,
    select_removable,
    wait_for_removals,
)
from tests.helpers.parsed_flags import TINY, parse

STEPS = range(10, 130, 10)


def keep(last: int | None, every: int | None = None, *milestones: int) -> Retention:
    return Retention(keep_last=last, keep_every=every, milestones=milestones)


@pytest.mark.parametrize(
    ("rule", "saved", "stay"),
    [
        (keep(None, 20), 120, [*STEPS]),
        (keep(1), 120, [120]),
        (keep(3), 120, [100, 110, 120]),
        (keep(50), 120, [*STEPS]),
        (keep(2, 40), 120, [40, 80, 110, 120]),
        (keep(2, None, 10, 70, 999), 120, [10, 70, 110, 120]),
        # A run that began again at an older step: what lies after it belongs to nobody's rule.
        (keep(2), 80, [70, 80, 90, 100, 110, 120]),
    ],
)
def test_the_rule_says_what_stays(rule: Retention, saved: int, stay: list[int]) -> None:
    assert [step for step in STEPS if step not in select_removable(STEPS, saved, rule)] == stay
    assert 30 not in select_removable(STEPS, saved, rule, kept=[30])


def write_iteration(folder: Path, step: int) -> Path:
    directory = folder / f"iter_{step:07d}"
    directory.mkdir()
    (directory / "__0_0.distcp").write_bytes(b"x" * step)
    write_hashes(directory)
    return directory


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    for step in STEPS:
        write_iteration(tmp_path, step)
    (tmp_path / LATEST_FILE).write_text("120")
    return tmp_path


def list_steps(folder: Path) -> list[int]:
    return list(iterations.list_iterations(folder))


def retain(folder: Path, rule: Retention, loaded: Path | None = None) -> None:
    thread = Retainer(folder, rule, loaded)(folder)
    assert thread is not None
    thread.join()


def test_what_was_loaded_and_what_is_not_ours_stays(save_dir: Path) -> None:
    shutil.rmtree(save_dir / "iter_0000010")
    (save_dir / "iter_0000010").symlink_to(write_iteration(save_dir.parent, 10))
    (save_dir / "iter_0000020" / "integrity.json").unlink()  # as another program saves
    (save_dir / "iter_0000030" / "notes.txt").write_text("do not lose me")
    (save_dir / "iter_0000040" / "integrity.json").write_text("damaged")
    (save_dir / "other").mkdir()
    assert not any(is_own(save_dir / f"iter_00000{step}0") for step in range(1, 5))
    retain(save_dir, keep(2), save_dir / "iter_0000060")
    assert list_steps(save_dir) == [10, 20, 30, 40, 60, 110, 120]
    assert (save_dir / "iter_0000010" / "__0_0.distcp").exists()
    assert (save_dir / "other").exists()
    shutil.rmtree(save_dir.parent / "iter_0000010")


def test_what_is_still_to_be_evaluated_stays(save_dir: Path) -> None:
    retainer = Retainer(save_dir, keep(1), None, lambda iterations: [step for step in iterations if step in (20, 70)])
    thread = retainer(save_dir)
    assert thread is not None
    thread.join()
    assert list_steps(save_dir) == [20, 70, 120]


def test_another_folder_is_left_alone(save_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "non_persistent"
    other.mkdir()
    write_iteration(other, 5)
    (other / LATEST_FILE).write_text("5")
    assert Retainer(save_dir, keep(1), other / "iter_0000005")(other) is None
    (save_dir / LATEST_FILE).write_text("release")
    assert Retainer(save_dir, keep(1), None)(save_dir) is None


def test_a_kill_in_a_removal_leaves_nothing_that_looks_like_a_checkpoint(
    save_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends after the first file is removed; the next one clears the rest."""
    rmtree = shutil.rmtree

    def be_killed(path: Path, **_: object) -> None:
        if path.exists():
            os.unlink(path / "__0_0.distcp")
            raise KeyboardInterrupt

    monkeypatch.setattr(iterations.shutil, "rmtree", be_killed)
    with pytest.raises(KeyboardInterrupt):
        iterations.remove_iteration(save_dir / "iter_0000010")
    monkeypatch.setattr(iterations.shutil, "rmtree", rmtree)
    assert list_steps(save_dir) == [*STEPS][1:]
    assert iterations.remove_leftovers(save_dir) == ["removed_iter_0000010"]
    assert not (save_dir / "removed_iter_0000010").exists()


def test_the_rule_is_read_from_the_flags(tmp_path: Path) -> None:
    flags = ("--save", str(tmp_path), "--keep-last", "3", "--keep-every", "50", "--keep-iterations", "7", "9")
    assert read_rule(parse(*TINY, *flags).settings.checkpoints) == keep(3, 50, 7, 9)
    assert read_rule(parse(*TINY).settings.checkpoints) == keep(None)


def test_an_iteration_that_cannot_be_removed_is_a_warning(save_dir: Path, monkeypatch, capsys) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(retention, "remove_iteration", refuse)
    Retainer(save_dir, keep(11), None)(save_dir)
    wait_for_removals()
    assert capsys.readouterr().err.startswith(f"warning: keep-last: {save_dir}/iter_0000010 cannot be removed: Operat")
    assert not [thread for thread in threading.enumerate() if thread.name == retention.THREAD_NAME]
