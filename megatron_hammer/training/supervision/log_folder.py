"""Where the log of each rank lies. Pure but for making a folder."""

import os
import re
import stat
import tempfile
from pathlib import Path

LOG_DIR_VARIABLE = "HAMMER_LOG_DIR"  # the launcher's choice, for a run without --save


def find_log_dir(save_dir: Path | None) -> Path:
    """logs/ under --save; without it, a folder of this run in the system's temporary directory, which is made.

    Other users can write to the temporary directory. One who makes the folder first, or a link in its place, would
    choose where this run writes; then the folder gets a random name.
    """
    if save_dir is not None:
        return save_dir / "logs"
    if LOG_DIR_VARIABLE in os.environ:
        return Path(os.environ[LOG_DIR_VARIABLE])
    # torchrun calls every run "none" unless told otherwise, and users share the machine.
    run_id = re.sub(r"[^\w.-]", "_", os.environ.get("TORCHELASTIC_RUN_ID", "run"))
    path = Path(tempfile.gettempdir()) / f"megatron_hammer-{os.getuid()}-{run_id}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or others_write:
            return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
    return path


def find_log(log_dir: Path, rank: int) -> Path:
    return log_dir / f"rank-{rank}.log"
