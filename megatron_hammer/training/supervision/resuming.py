"""Where a run stands on disk, and with which arguments it is started again. Pure but for reading one file."""

from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE, read_tracker

# They say how the first attempt begins, such as from another run's checkpoint, and would do so again.
_BEGINNINGS_WITH_VALUE = ("--load", "--ckpt-step", "--pretrained-checkpoint")
_BEGINNINGS = ("--finetune", "--no-load-optim", "--no-load-rng")


def find_tracker(save_dir: Path) -> Path:
    """The file that names the newest checkpoint, written after it."""
    return save_dir / LATEST_FILE


def read_saved_step(save_dir: Path | None) -> int:
    """The step of the newest checkpoint in `save_dir`; 0 without one."""
    if save_dir is None:
        return 0
    tracked = read_tracker(save_dir)
    return tracked if isinstance(tracked, int) else 0


def continue_own_run(arguments: Sequence[str], save_dir: Path) -> tuple[str, ...]:
    """`arguments` of training such that it resumes from the run's own checkpoint in `save_dir`, whatever it began with.

    Without --load they are returned unchanged: training then loads from --save.
    """
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in _BEGINNINGS_WITH_VALUE:
            next(words, None)
        elif word not in _BEGINNINGS and not word.startswith(tuple(f"{flag}=" for flag in _BEGINNINGS_WITH_VALUE)):
            kept.append(word)
    return tuple(arguments) if len(kept) == len(arguments) else (*kept, "--load", str(save_dir))
