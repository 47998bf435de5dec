"""Opens a checkpoint of either Megatron format: finds the iteration, detects the format, and returns its reader."""

from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import (
    LATEST_FILE,
    RELEASE,
    CheckpointReader,
    name_folder,
    read_tracker,
    validate_iteration,
)
from megatron_hammer.checkpoint_files.legacy.reader import open_legacy_checkpoint
from megatron_hammer.checkpoint_files.torch_dist.reader import TorchDistReader
from megatron_hammer.errors import CheckpointError

WEIGHTS = ("model", "master")


def open_checkpoint(path: str | Path, *, iteration: int | None = None, weights: str = "model") -> CheckpointReader:
    """Open `path`: a directory that Megatron saved into (the latest or the given iteration) or one iteration of it.

    weights: "model", or "master" for the fp32 copies in the optimizer's state under the same names.
    Raises CheckpointError if it is not there, is of another format, is incomplete, or the state is of another
    iteration than its name.
    """
    if weights not in WEIGHTS:
        raise CheckpointError(f"weights: must be one of {', '.join(WEIGHTS)}, got {weights}. Choose one of them.")
    directory = find_iteration(Path(path), iteration)
    if is_legacy(directory):
        if (directory / ".metadata").is_file():
            raise CheckpointError(
                f"{directory}: must hold one checkpoint, got both .metadata and mp_rank_* folders. Move one away."
            )
        return open_legacy_checkpoint(directory, weights=weights)
    reader = TorchDistReader(directory, weights=weights)
    validate_iteration(directory, reader.iteration)
    return reader


def find_iteration(path: Path, iteration: int | None = None) -> Path:
    """The directory of one iteration under `path`; raises CheckpointError naming what is there instead."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: checkpoint directory does not exist. Pass the directory given to --save.")
    # Before the tracker: `path` may be one iteration itself.
    if (path / ".metadata").is_file() or is_legacy(path):
        if iteration is not None and path.resolve().name != name_folder(iteration):
            raise CheckpointError(
                f"{path}: must be a directory of iterations to choose one, got one of them and iteration={iteration}. "
                "Pass the directory above it, or drop --iteration."
            )
        return path
    if (path / LATEST_FILE).is_file() and iteration is None:
        tracker = read_tracker(path)
        # The two contents that Megatron accepts. Source: megatron.training.checkpointing.read_metadata.
        if not isinstance(tracker, int) and tracker != RELEASE:
            raise CheckpointError(
                f"{path / LATEST_FILE}: must hold an iteration or 'release', got {str(tracker)[:40]!r}. "
                "Pass --iteration."
            )
        directory = path / name_folder(tracker if isinstance(tracker, int) else None)
    elif iteration is None:
        raise CheckpointError(
            f"{path}: must hold {LATEST_FILE} or be one iteration with its .metadata, got neither. "
            "Pass the directory given to --save."
        )
    else:
        directory = path / name_folder(iteration)
    if not directory.is_dir():
        present = sorted(entry.name for entry in path.glob("iter_*")) or "none"
        raise CheckpointError(f"{directory}: iteration does not exist, got {present}. Pass --iteration of one of them.")
    return directory


def is_legacy(directory: Path) -> bool:
    """Whether the directory of an iteration is of `--ckpt-format torch`: one folder a rank."""
    return any(directory.glob("mp_rank_*"))
