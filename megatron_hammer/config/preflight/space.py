"""Room for a checkpoint where --save is: at the start of a run, and again before each save."""

import os
import shutil
from pathlib import Path

from megatron_hammer.checkpoint_files.iterations import list_iterations
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.checkpoint_size import estimate_checkpoint_bytes


def estimate_iteration_bytes(plan: RunPlan) -> int:
    """Bytes of one iteration at most: weights in their precision, and the state of Adam. Else the weights alone."""
    flags = plan.flags
    has_state = flags["optimizer"] == "adam" and not flags["no_save_optim"]
    return estimate_checkpoint_bytes(
        count_parameters(plan.model), element_bytes=plan.memory.element_bytes, has_optimizer_state=has_state
    )


def count_needed_bytes(plan: RunPlan, save_dir: Path) -> int:
    """Bytes of the newest iteration in `save_dir`, else the estimate."""
    for directory in reversed(list_iterations(save_dir).values()):
        if size := sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()):
            return size
    return estimate_iteration_bytes(plan)


def find_space_problems(save: str, needed_bytes: int) -> list[str]:
    """A problem if the file system of `save`, which need not exist, has too little room. Quotas are not seen."""
    folder = Path(save).absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError:
        return []  # said where it is written
    if free_bytes >= needed_bytes:
        return []
    return [
        f"save: must have room for a checkpoint of {needed_bytes / GIB:.1f} GiB, got {free_bytes / GIB:.1f} GiB free "
        f"in {save}. Free some, or pass another --save."
    ]
