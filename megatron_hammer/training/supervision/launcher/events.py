"""events.jsonl: what happened to a run, in the order in which it happened, one JSON object a line.

Written by the launcher of every node, and by the rank that has checkpoints evaluated. Each line has the time (UTC), the
event, the host and a sentence for a person; docs/operations.md lists the events and their fields.
"""

import datetime
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends to `path`; None keeps nothing. A disk that is full or gone is reported once and ends nothing."""

    def __init__(self, path: Path | None):
        self.path = path
        self._host = socket.gethostname()

    def write(self, event: str, message: str, **fields: Any) -> None:
        """Append one event. message: a sentence. fields: what a program reads, such as rank, step, exit_code."""
        if self.path is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": now, "event": event, "host": self._host, **fields, "message": message})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write of O_APPEND, so that lines of several launchers do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"warning: {self.path}: events are not written: {error.strerror}", file=sys.stderr)
            self.path = None
