"""Every rank compares a share of a checkpoint's files with what was saved, and all ranks learn what each has found.

The shares are of like size, so that this takes about as long as loading. Nothing is unpickled before.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint_files.intact import find_hidden_damage
from megatron_hammer.checkpoint_files.open_checkpoint import is_legacy
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import find_wrong_files, read_hashes
from megatron_hammer.errors import CheckpointError
from megatron_hammer.platforms.agreement import gather_from_ranks

_MAX_THREADS = 8  # of a rank; hashing is done at about 1 GB/s by each
# Iterations that were read in this process, or that --no-verify-checkpoint leaves out; None: it leaves out all.
_verified: set[str] | None = set()


def leave_out() -> None:
    """From now on, nothing is verified: --no-verify-checkpoint."""
    global _verified
    _verified = None


def find_damage_together(directory: Path) -> list[str]:
    """A sentence for everything that is wrong with the files of an iteration, the same on all ranks, which all call."""
    import torch

    is_group = torch.distributed.is_initialized()
    index, num_shares = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_group else (0, 1)
    try:
        found = _find_damage(directory, index, num_shares)
    except CheckpointError as error:
        found = list(error.problems)
    problems = [problem for of_rank in gather_from_ranks(found) for problem in of_rank]
    if not problems and _verified is not None:
        _verified.add(str(directory))
    return list(dict.fromkeys(problems))


def _find_damage(directory: Path, index: int, num_shares: int) -> list[str]:
    hashes = None if is_legacy(directory) else read_hashes(directory)
    # Every rank compares the sizes: each must see the files that it is about to read.
    wrong = find_wrong_files(directory, hashes) if hashes is not None else []
    ranks_of_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // ranks_of_host))
    return wrong or find_hidden_damage(directory, index=index, num_shares=num_shares, num_threads=num_threads)


def verify_before_loading(load: Callable[..., Any], *, position: int) -> Callable[..., Any]:
    """Wrap a function of dist_checkpointing that reads the folder at this position of its arguments.

    The iteration that a run resumes from has been verified before. This is for every other way to one, such as
    --non-persistent-ckpt-type. Raises CheckpointError on all ranks.
    """

    @functools.wraps(load)
    def verify_and_load(*args: Any, **kwargs: Any) -> Any:
        directory = args[position] if len(args) > position else kwargs.get("checkpoint_dir")
        if directory is not None and _verified is not None and str(directory) not in _verified:
            problems = find_damage_together(Path(directory))
            if problems:
                raise CheckpointError(*problems)
        return load(*args, **kwargs)

    return verify_and_load


def apply() -> None:
    """Wrap the two functions through which Megatron reads an iteration in the torch_dist format."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.load = verify_before_loading(dist_checkpointing.load, position=1)
    dist_checkpointing.load_common_state_dict = verify_before_loading(
        dist_checkpointing.load_common_state_dict, position=0
    )
