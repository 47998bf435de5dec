"""Which iteration of a folder a run begins with: the one that the tracker names, or the newest intact one before it.

Looks at each iteration as far as intact.find_visible_damage does. What only reading all files shows is given as
`rejected` by who has read them. The answer depends on the disk alone, so a dry run and the run agree.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE, RELEASE, name_folder, read_tracker
from megatron_hammer.checkpoint_files.intact import find_visible_damage
from megatron_hammer.checkpoint_files.iterations import list_iterations
from megatron_hammer.checkpoint_files.open_checkpoint import is_legacy
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HASHES_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadChoice:
    """directory: what to load; None with `problems` where nothing may be loaded, and without where there is nothing.

    iteration: None of a release. notes: one sentence for each thing that is not as it should be and was passed over.
    """

    directory: Path | None = None
    iteration: int | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a save in this folder ever came to its end: there is a tracker, or an iteration with its description."""
    # os.path, since pathlib raises for a name that is too long.
    is_tracked = os.path.isfile(os.path.join(folder, LATEST_FILE))
    return is_tracked or any(map(_was_complete, list_iterations(Path(folder)).values()))


def _was_complete(directory: Path) -> bool:
    """Without these, a save was interrupted before its end; they are written last."""
    return any((directory / name).is_file() for name in (HASHES_FILE, "metadata.json")) or is_legacy(directory)


def choose_iteration(
    folder: Path,
    *,
    step: int | None = None,
    has_fall_back: bool = True,
    rejected: Mapping[Path, str] | None = None,
    find_damage: Callable[[Path], list[str]] = find_visible_damage,
) -> LoadChoice:
    """What a run that is given `folder` loads. step: the user names it (--ckpt-step), so no other is taken.

    rejected: why an iteration that looks intact is not.
    """
    tracked = read_tracker(folder)

    def find_reason(directory: Path, named_by: str = LATEST_FILE) -> str | None:
        if rejected and directory in rejected:
            return rejected[directory]
        missing = None if directory.is_dir() else _describe_missing(directory, named_by)
        return missing or next(iter(find_damage(directory)), None)

    def require(directory: Path, number: int | None, named_by: str = LATEST_FILE) -> LoadChoice:
        reason = find_reason(directory, named_by)
        chosen = LoadChoice(directory=directory, iteration=number)
        return chosen if reason is None else LoadChoice(problems=(reason,))

    if step:
        return require(folder / name_folder(step), step, "--ckpt-step")
    if tracked == RELEASE:
        return require(folder / RELEASE, None)
    if isinstance(tracked, int) and not has_fall_back:
        return require(folder / name_folder(tracked), tracked)
    iterations = list_iterations(folder)
    notes = [] if isinstance(tracked, int) else _describe_tracker(folder, tracked, len(iterations))
    if not has_fall_back:
        return LoadChoice(problems=tuple(notes))
    wanted = (
        {tracked, *(number for number in iterations if number <= tracked)} if isinstance(tracked, int) else iterations
    )
    for number in sorted(wanted, reverse=True):
        directory = folder / name_folder(number)
        reason = find_reason(directory)
        if reason is None:
            notes += [f"{folder}: continuing from {directory.name}, the newest intact iteration."] if notes else []
            return LoadChoice(directory=directory, iteration=number, notes=tuple(notes))
        notes.append(f"{directory.name} is passed over: {reason}")
    if not has_checkpoint(folder):
        return LoadChoice(notes=tuple(notes))
    remedy = "Restore one of them, or remove the folder to start anew."
    return LoadChoice(
        problems=(*notes, f"{folder}: must hold an intact iteration, got none of {len(wanted)}. {remedy}")
    )


def _describe_missing(directory: Path, named_by: str) -> str:
    return (
        f"checkpoint {directory.name} named by {named_by} is missing, got {directory}. "
        "Copy it there, or name a step that exists with --ckpt-step."
    )


def _describe_tracker(folder: Path, text: object, num_iterations: int) -> list[str]:
    path = folder / LATEST_FILE
    if text is not None:
        return [f"{path}: must hold a step number or 'release', got {str(text)[:40]!r}. Name a step with --ckpt-step."]
    return [f"{path}: must exist beside {num_iterations} iterations, got no such file."] if num_iterations else []
