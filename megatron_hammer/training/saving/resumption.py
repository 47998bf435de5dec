"""All ranks begin with the same iteration, one whose every byte is as it was saved.

Preflight has chosen an iteration by its sizes and descriptions (checkpoint_files/newest_intact.py). Here, after the
process group has formed, the ranks read all of it, each a share. If a file is damaged, an older iteration takes its
place, and what preflight found about resuming is asked again for that one.
"""

import dataclasses
from pathlib import Path
from typing import IO

from megatron_hammer.checkpoint_files.intact import has_hashes
from megatron_hammer.checkpoint_files.newest_intact import LoadChoice
from megatron_hammer.checkpoint_files.open_checkpoint import is_legacy
from megatron_hammer.config.preflight.data_order import find_data_order_problems
from megatron_hammer.config.preflight.resume import find_resume_problems
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.config.saved_run import (
    UNREAD_FORMATS,
    choose_checkpoint,
    find_checkpoint_to_load,
    find_resumed_run,
)
from megatron_hammer.errors import CheckpointError
from megatron_hammer.platforms import checkpoint_verification
from megatron_hammer.platforms.agreement import ask_first_rank


def agree_on_checkpoint(plan: RunPlan, terminal: IO[str]) -> RunPlan:
    """The plan with the iteration that all ranks load; called by all of them.

    Raises CheckpointError on all ranks if what was asked for is damaged and no older iteration may take its place, or
    if the run cannot continue from that one.
    """
    checkpoints = plan.checkpoints
    is_verified = checkpoints.is_verified and checkpoints.format not in UNREAD_FORMATS
    if not checkpoints.is_verified:
        checkpoint_verification.leave_out()
    rejected: dict[Path, str] = {}
    while True:
        choice = ask_first_rank(lambda: choose_checkpoint(checkpoints, rejected))
        if choice.problems:
            raise CheckpointError(*choice.problems)
        if choice.directory is None or not is_verified:
            break
        damage = checkpoint_verification.find_damage_together(choice.directory)
        if not damage:
            break
        rejected[choice.directory] = damage[0]
    agreed = dataclasses.replace(plan, checkpoints=dataclasses.replace(checkpoints, agreed=choice))
    if rejected:
        ask_first_rank(lambda: _require_resumable(agreed))
    if plan.machine.rank == 0:
        for note in describe_choice(choice, find_checkpoint_to_load(checkpoints), is_verified=is_verified):
            print(note, file=terminal, flush=True)
    return agreed


def _require_resumable(plan: RunPlan) -> None:
    saved = find_resumed_run(plan)
    problems = [] if saved is None else find_resume_problems(plan, plan, saved)
    problems = problems or find_data_order_problems(plan)
    if problems:
        raise CheckpointError(*problems)


def describe_choice(choice: LoadChoice, folder: str | None, *, is_verified: bool) -> list[str]:
    """What a person should know of the choice, one sentence each."""
    notes = list(choice.notes)
    if choice.directory is None or not is_verified:
        return notes
    if is_legacy(choice.directory) or not has_hashes(choice.directory):
        notes.append(
            f"{choice.directory}: was saved without hashes of its files, so only the checksums of its tensors were "
            "compared; files of another iteration among them would not be noticed."
        )
    return notes
