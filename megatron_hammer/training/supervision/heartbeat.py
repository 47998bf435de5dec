"""What outside monitors read of a run: a file that is as old as its last step, and Prometheus' text format.

Written by the rank that records the metrics, the last one, at most once per second. A disk that is full or gone costs a
heartbeat and nothing else.
"""

import contextlib
import datetime
import http.server
import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import replace_non_finite
from megatron_hammer.training.supervision.progress import ATTEMPT_VARIABLE
from megatron_hammer.training.supervision.resuming import find_tracker, read_saved_step

HEARTBEAT_FILE: Final = "heartbeat.json"
_INTERVAL_S = 1.0
# One client is served after the other: connections that nobody closes must not use up the files a rank may open.
_CLIENT_TIMEOUT_S = 2.0
# Key of a heartbeat, Prometheus' name, its type, and what it is.
_SERIES = (
    ("step", "hammer_step", "gauge", "Last finished step."),
    ("train_steps", "hammer_train_steps", "gauge", "Steps of the whole schedule."),
    ("loss", "hammer_loss", "gauge", "Training loss of the last step, nats per token."),
    ("tokens_per_s", "hammer_tokens_per_second", "gauge", "Tokens per second of the last step, all ranks."),
    ("step_time_s", "hammer_step_seconds", "gauge", "Time of the last step."),
    ("checkpoint_step", "hammer_checkpoint_step", "gauge", "Step of the newest checkpoint, 0 without one."),
    ("checkpoint_age_s", "hammer_checkpoint_age_seconds", "gauge", "Time since the newest checkpoint was written."),
    ("restarts", "hammer_restarts_total", "counter", "Restarts after failures, since the launcher started."),
    ("written_at_s", "hammer_heartbeat_timestamp_seconds", "gauge", "Unix time of these values."),
)


class Heartbeat:
    """save_dir: of the checkpoints and of heartbeat.json, None for neither. textfile_path: Prometheus' text, or None.

    port: where `/metrics` is served, on all addresses of this host; None for none. Raises ConfigError if it is taken.
    """

    def __init__(self, run: str, save_dir: Path | None, textfile_path: Path | None, port: int | None):
        self._run, self._save_dir, self._textfile_path = run, save_dir, textfile_path
        self._beat: dict[str, Any] = {}
        self._written_at_s = 0.0
        if port is not None:
            self._serve(port)

    def beat(self, *, step: int, train_steps: int, loss: float, tokens_per_s: float, step_time_s: float) -> None:
        """A step is finished. Units as in StepMetrics."""
        now_s = time.time()
        self._beat = {
            "time": datetime.datetime.fromtimestamp(now_s, datetime.UTC).isoformat(timespec="seconds"),
            "written_at_s": now_s,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "step": step,
            "train_steps": train_steps,
            "loss": loss,
            "tokens_per_s": tokens_per_s,
            "step_time_s": step_time_s,
            "restarts": int(os.environ.get(ATTEMPT_VARIABLE, "0")),
        }
        # By monotonic time: after a change of the date, the difference of two times could be years.
        if time.monotonic() - self._written_at_s >= _INTERVAL_S or step == train_steps:
            self._written_at_s = time.monotonic()
            self._write()

    def finish(self) -> None:
        """The run has ended, after its last checkpoint."""
        if self._beat:
            self._write()

    def describe(self) -> dict[str, Any]:
        """The last heartbeat, with the newest checkpoint as it is now; {} before the first step."""
        return {**self._beat, **describe_checkpoint(self._save_dir)} if self._beat else {}

    def _write(self) -> None:
        described = self.describe()
        if self._save_dir is not None:
            values = replace_non_finite(described)
            _replace(self._save_dir / HEARTBEAT_FILE, json.dumps(values, indent=2) + "\n")
        if self._textfile_path is not None:
            _replace(self._textfile_path, render_prometheus(described, self._run))

    def _serve(self, port: int) -> None:
        heartbeat = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = _CLIENT_TIMEOUT_S

            def do_GET(self) -> None:
                if self.path.split("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                body = render_prometheus(heartbeat.describe(), heartbeat._run).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass  # a line per scrape would fill the log

        class Server(http.server.HTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that has left is no error of the run

        try:
            self.server = Server(("", port), Handler)
        except OSError as error:
            raise ConfigError(
                f"prometheus-port: must be free on the host of the last rank, got {port} on {socket.gethostname()}: "
                f"{error.strerror}. Pass another port."
            ) from None
        threading.Thread(target=self.server.serve_forever, name="prometheus", daemon=True).start()


def describe_checkpoint(save_dir: Path | None) -> dict[str, Any]:
    """Step and age of the newest checkpoint; age None without one."""
    step = read_saved_step(save_dir)
    age_s = None
    if save_dir is not None and step:
        with contextlib.suppress(OSError):
            age_s = max(0.0, time.time() - find_tracker(save_dir).stat().st_mtime)
    return {"checkpoint_step": step, "checkpoint_age_s": age_s}


def render_prometheus(described: Mapping[str, Any], run: str) -> str:
    """Prometheus' text exposition format 0.0.4; only the series that have a value."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for key, name, kind, meaning in _SERIES:
        value = described.get(key)
        if value is not None:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f'{name}{{run="{label}"}} {_spell(value)}']
    return "".join(f"{line}\n" for line in lines)


def _spell(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def _replace(path: Path, text: str) -> None:
    """In one step, so that no reader sees half of it; without the sync of publish_file, which may wait for a disk."""
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
