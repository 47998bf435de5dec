"""Which iterations a run keeps, and the removal of the others after each save.

With --keep-last N the newest N stay, besides those that --keep-every and --keep-iterations name; without it all stay.
Never removed: the iteration that was just saved, the one that this process began with, those after the saved one, those
that --evaluate-every has still to evaluate, and whatever this package did not write: a link, a folder without hashes, a
folder with other files in it.
"""

import sys
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import read_tracker
from megatron_hammer.checkpoint_files.iterations import list_iterations, remove_iteration
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HASHES_FILE, read_hashes
from megatron_hammer.config.run_plan import Checkpoints
from megatron_hammer.errors import CheckpointError

THREAD_NAME = "retention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """keep_last: None keeps all. keep_every: iterations that it divides stay. milestones: these stay."""

    keep_last: int | None
    keep_every: int | None
    milestones: tuple[int, ...]


def read_rule(checkpoints: Checkpoints) -> Retention:
    """The rule of a command line."""
    return Retention(
        keep_last=checkpoints.keep_last, keep_every=checkpoints.keep_every, milestones=checkpoints.keep_iterations
    )


def select_removable(
    iterations: Iterable[int], saved: int, rule: Retention, *, kept: Collection[int] = ()
) -> list[int]:
    """Those that no rule keeps, of iterations up to `saved`, the newest. kept: these stay too."""
    until_now = sorted(number for number in iterations if number <= saved)
    if rule.keep_last is None:
        return []
    stay = {saved, *until_now[-rule.keep_last :], *rule.milestones, *kept}
    return [
        number for number in until_now if number not in stay and not (rule.keep_every and not number % rule.keep_every)
    ]


def is_own(directory: Path) -> bool:
    """Whether a save of this package wrote the folder, all that is in it."""
    if directory.is_symlink():
        return False
    try:
        hashes = read_hashes(directory)
    except CheckpointError:
        return False
    return hashes is not None and {entry.name for entry in directory.iterdir()} <= {*hashes, HASHES_FILE}


class Retainer:
    """Called with a folder whenever its tracker names a new iteration; removes what no rule keeps, in a thread.

    loaded_dir: the iteration that this process began with; None without one. select_needed: those of
    given iterations that are still to be read.
    """

    def __init__(
        self,
        save_dir: Path,
        rule: Retention,
        loaded_dir: Path | None,
        select_needed: Callable[[Collection[int]], Collection[int]] = lambda iterations: (),
    ):
        self.save_dir, self.rule, self._select_needed = save_dir, rule, select_needed
        is_here = loaded_dir is not None and loaded_dir.parent.resolve() == save_dir.resolve()
        self._loaded = [number for number, path in list_iterations(save_dir).items() if is_here and path == loaded_dir]

    def __call__(self, folder: Path) -> threading.Thread | None:
        saved = read_tracker(folder)
        if folder.resolve() != self.save_dir.resolve() or not isinstance(saved, int):
            return None
        own = {number: path for number, path in list_iterations(folder).items() if is_own(path)}
        kept = {*self._loaded, *self._select_needed(own)}
        removable = [own[number] for number in select_removable(own, saved, self.rule, kept=kept)]
        # A daemon, since a rank that fails must end; `wait_for_removals` is for the end of a run.
        thread = threading.Thread(target=lambda: list(map(_remove, removable)), name=THREAD_NAME, daemon=True)
        thread.start()
        return thread


def _remove(directory: Path) -> None:
    try:
        remove_iteration(directory)
    except OSError as error:
        print(
            f"warning: keep-last: {directory} cannot be removed: {error.strerror}. It is tried again.", file=sys.stderr
        )


def wait_for_removals() -> None:
    """Until the files of all iterations that are being removed are gone."""
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join()
