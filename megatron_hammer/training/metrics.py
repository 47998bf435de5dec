"""What is measured about a run: steps and saves in metrics.jsonl, evaluations in validation.jsonl, an object for each.

No torch: megatron's values arrive as plain numbers from `training/observer.py`. Every figure carries its definition
in `RunFacts`; where a figure has none (an MFU without a known peak) it is null, never a guess.
"""

import contextlib
import errno
import json
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.files.typed import replace_non_finite

MFU_CONVENTION: Final = "A"  # layers and head with causal attention, no input embedding; see model/flops.py
ETA_WINDOW_STEPS = 20
SAVED_FIELD = "saved"  # only the line of a saved checkpoint has it: the name of its folder


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What does not change while a run lasts."""

    description: str  # model, layout, platform and backend in one line
    train_steps: int
    seq_length: int
    world_size: int
    flops_per_token: int  # in MFU_CONVENTION, forward and backward, without recomputation
    peak_tflops: float | None  # dense, of one GPU; None: no MFU
    device_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    num_samples: int
    num_tokens: int  # consumed since the beginning of training
    step_tokens: int
    step_time_s: float  # from fetching the first micro-batch to the loss on the host; no evaluation, no checkpoint
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    model_tflops_per_gpu: float
    mfu: float | None
    mfu_convention: str
    peak_tflops: float | None
    eta_s: float
    peak_memory_bytes: int  # of the rank that needs most
    loss_scale: float
    is_skipped: bool  # the optimizer skipped the step (overflow or NaN)
    learned_tokens: int | None = None  # of step_tokens, those with a loss; of conversations only
    padding_share: float | None = None  # of step_tokens, those that hold no conversation


class MetricsLog:
    """Computes and appends step metrics. Used by the one rank that knows the loss.

    metrics_path: None keeps the metrics in memory only. first_step: the first step of this process; lines of an
    earlier process at or after it (it was killed after its last checkpoint) are dropped, since those steps run again.
    """

    def __init__(self, facts: RunFacts, metrics_path: Path | None, first_step: int):
        self.facts = facts
        self.history: list[StepMetrics] = []
        self.num_dropped = 0
        self._step_times_s: deque[float] = deque(maxlen=ETA_WINDOW_STEPS)
        self._file: LineFile | None = None
        self._validation_file: LineFile | None = None
        self._validated: set[tuple[int, str]] = set()
        if metrics_path is not None:
            metrics_path.parent.mkdir(parents=True, exist_ok=True)
            self.num_dropped = drop_lines_from(metrics_path, first_step, "loss")
            validation_path = metrics_path.with_name("validation.jsonl")
            drop_lines_from(validation_path, first_step, "loss", "validation_set")
            if validation_path.exists():
                self._validated = {(line["step"], line["validation_set"]) for line in read_metrics(validation_path)}
            self._file, self._validation_file = LineFile(metrics_path), LineFile(validation_path)

    def add_step(
        self,
        *,
        num_samples: int,
        step_samples: int,
        step_time_s: float,
        learned_share: float | None = None,
        **values: Any,
    ) -> StepMetrics:
        """Derive the rates of one step and write its line. learned_share: of its tokens. Returns the metrics."""
        facts = self.facts
        step_tokens = step_samples * facts.seq_length
        self._step_times_s.append(step_time_s)
        tokens_per_s = step_tokens / step_time_s
        # FLOP/s = tokens/s x FLOPs per token, shared equally by the ranks.
        tflops_per_gpu = tokens_per_s * facts.flops_per_token / facts.world_size / 1e12
        mean_step_time_s = sum(self._step_times_s) / len(self._step_times_s)
        metrics = StepMetrics(
            **values,
            num_samples=num_samples,
            num_tokens=num_samples * facts.seq_length,
            step_tokens=step_tokens,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_gpu=tokens_per_s / facts.world_size,
            model_tflops_per_gpu=tflops_per_gpu,
            mfu=None if facts.peak_tflops is None else tflops_per_gpu / facts.peak_tflops,
            mfu_convention=MFU_CONVENTION,
            peak_tflops=facts.peak_tflops,
            eta_s=(facts.train_steps - values["step"]) * mean_step_time_s,
            learned_tokens=None if learned_share is None else round(learned_share * step_tokens),
        )
        self.history.append(metrics)
        if self._file is not None:
            self._file.append(asdict(metrics))
        return metrics

    def add_validation(self, *, step: int, validation_set: str, loss: float) -> dict[str, Any]:
        """Write one line of validation.jsonl: loss in nats per token and its perplexity. Returns the object.

        A step has one line: a run that was killed after its last evaluation evaluates again, on other samples.
        """
        line = {
            "step": step,
            "validation_set": validation_set,
            "loss": loss,
            # exp() overflows a double above 709.
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
        }
        if self._validation_file is not None and (step, validation_set) not in self._validated:
            self._validation_file.append(line)
        return line

    def add_save(self, *, step: int, name: str, save_time_s: float, save_bytes: int) -> None:
        """Write the line of a saved checkpoint. save_time_s: how long training waited for it."""
        line = {"step": step, SAVED_FIELD: name, "save_time_s": save_time_s, "save_bytes": save_bytes}
        if self._file is not None:
            self._file.append(line)

    @property
    def failure(self) -> str | None:
        """What was wrong with a file at its last line; None while nothing is."""
        return next((file.failure for file in (self._file, self._validation_file) if file and file.failure), None)

    def close(self) -> None:
        for file in (self._file, self._validation_file):
            if file is not None:
                file.close()


class LineFile:
    """Appends JSON lines. Where the disk takes none, training continues: they are kept, and written when it does.

    Every line is written at once, so that a killed run keeps every finished step, and a person can follow the file.
    failure: what was wrong at the last line, with the file's name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.failure: str | None = None
        self._waiting = b""
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self._open()

    def append(self, line: dict[str, Any]) -> None:
        self._waiting += json.dumps(replace_non_finite(line), allow_nan=False).encode() + b"\n"
        self.failure = None
        try:
            self._write()
        except OSError as error:
            self.failure = f"{self.path}: {error.strerror}; training continues, and the lines wait"

    def _open(self) -> None:
        self._file = self.path.open("a+b", buffering=0)
        # An editor may have left the last line without its end.
        if self._file.seek(0, os.SEEK_END) and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
            self._waiting = b"\n" + self._waiting

    def _write(self) -> None:
        if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:
            self.failure = f"{self.path}: was deleted; training continues, in a new file"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            assert self._file is not None
        size_bytes = os.fstat(self._file.fileno()).st_size
        if self._file.write(self._waiting) != len(self._waiting):  # no half line may stay
            os.ftruncate(self._file.fileno(), size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def drop_lines_from(path: Path, first_step: int, *names: str) -> int:
    """Keep the lines of `path` whose step is before `first_step`; returns how many were dropped.

    A last line that was cut off by a kill counts as dropped. Raises DataError for any other line that is not ours.
    names: of fields that a line must have, unless it is that of a saved checkpoint.
    """
    if not path.exists():
        return 0
    # errors="replace": a damaged line must be named, and be no UnicodeDecodeError.
    lines = path.read_text(encoding="utf8", errors="replace").splitlines()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            step = int(fields["step"])
            if SAVED_FIELD not in fields and not {*names} <= {*fields}:
                raise KeyError
            if "loss" in names:
                float(fields.get("loss") or 0.0)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            # Only a last line can be cut off by a kill; any other bad line means that this is not our file.
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                continue
            raise DataError(
                f"{path}:{number}: must be one JSON object with a step{''.join(f' and {name}' for name in names)}, "
                f"got {line[:60]!r}. Move the file away."
            ) from None
        if step < first_step:
            kept.append(line)
    # A file that keeps all its lines is left as it is.
    if len(kept) < len(lines):
        publish_files({path: "".join(line + "\n" for line in kept)})
    return len(lines) - len(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, but not those of saved checkpoints; a loss of null is NaN, which JSON lacks."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    steps = [line for line in lines if SAVED_FIELD not in line]
    return [line | {"loss": math.nan} if line["loss"] is None else line for line in steps]


class Stopwatch:
    """Seconds since the last start."""

    def __init__(self) -> None:
        self._started_at_s = time.perf_counter()

    def start(self) -> None:
        self._started_at_s = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_at_s
