"""A training's metrics.jsonl and validation.jsonl, as training/metrics.py writes them: one JSON object per line."""

import json
import math
from pathlib import Path
from typing import Any

from megatron_hammer.errors import DataError
from megatron_hammer.files.read import read_bytes


def read_metrics(path: Path, *names: str) -> list[dict[str, Any]]:
    """The objects of a file, each with these fields. Raises DataError for a line that is none, with its number.

    An incomplete last line, from a killed run, is dropped, as training itself does when it continues.
    """
    lines = read_bytes(path, raises=DataError).decode(errors="replace").splitlines()
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and "saved" in entry:  # the line of a checkpoint
            continue
        if isinstance(entry, dict) and "saved" in entry:  # the line of a checkpoint
            continue
        if isinstance(entry, dict) and all(name in entry for name in names):
            # JSON has no NaN: a loss that was none is null.
            objects.append(entry | {"loss": math.nan} if entry.get("loss", 0.0) is None else entry)
        elif number < len(lines):
            raise DataError(
                f"{path}:{number}: must be one JSON object with {' and '.join(names)}, got {line[:60]!r}. "
                "Give a file that training wrote."
            )
    return objects
