"""Keeps megatron's own output (hundreds of lines on every rank) off the terminal, in one file per rank.

Errors still reach the terminal: stderr is left alone, only warnings and log records are diverted.
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import IO

from megatron_hammer.errors import ConfigError


def divert_output(log_dir: Path | None, rank: int) -> tuple[IO[str], Path]:
    """Send stdout, warnings and log records of this process to `<log_dir>/rank-<rank>.log`, appending.

    log_dir: None means a folder in the system's temporary directory. Returns the real stdout and the log's path.
    """
    if log_dir is None:
        # torchrun calls every run "none" unless told otherwise, and users share the machine.
        name = f"megatron_hammer-{os.getuid()}-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}"
        log_dir = Path(tempfile.gettempdir()) / name
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"save: must be a folder that can be made and written, got {log_dir}: {error.strerror}. "
            "Pass another --save."
        ) from error
    log_path = log_dir / f"rank-{rank}.log"
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf8", buffering=1)
    log_file = log_path.open("a", encoding="utf8", buffering=1)
    sys.stdout.flush()
    os.dup2(log_file.fileno(), 1)  # what compiled code prints goes there too
    sys.stdout = log_file

    def write_warning(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
        log_file.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = write_warning
    logging.basicConfig(stream=log_file, level=logging.INFO, force=True)
    return terminal, log_path
