"""What a run does about a step whose loss or gradient is not finite, or whose loss is far above the last ones.

Every step is judged on all ranks together after the backward pass, before the optimizer changes a weight. So a bad
batch never reaches the weights, whatever `--on-bad-loss` says:

stop        the weights before the step are saved, and the run ends with a sentence
skip-batch  the optimizer skips the step, and training continues with the next batch
roll-back   the run ends, and starts again from its newest checkpoint without the batches of the last steps
"""

import math
import socket
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.config.run_plan import BadLossPolicy
from megatron_hammer.config.training_state import TrainingState
from megatron_hammer.errors import CheckpointError, HammerError
from megatron_hammer.files.typed import read_json_lines
from megatron_hammer.platforms.agreement import gather_from_ranks
from megatron_hammer.training.metrics import LineFile
from megatron_hammer.training.supervision.last_words import write_note

SKIPPED_BATCHES_FILE = "skipped_batches.jsonl"
# Weights that are already broken give one bad step after another; skipping all the data does not mend them.
MAX_SKIPPED_IN_A_ROW = 5
MEDIAN_STEPS = 64  # a spike is measured against the median loss of so many steps
MIN_MEDIAN_STEPS = 16  # and not before so many
REASONS_SHOWN = 8
ROLLED_BACK_EXIT_CODE = 1  # a failure, after which the launcher starts the run again


class BadStepError(HammerError):
    """The run was stopped at a step that would have broken the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedBatch:
    """One line of skipped_batches.jsonl: the batch of `step`, which begins after `num_samples` samples of the run."""

    step: int
    num_samples: int
    reason: str


class StepJudge:
    """Judges the steps of one process of a run; all ranks call it alike.

    folder: of the run, where skipped batches are recorded; None records nothing. is_recorder: whether this rank writes
    and speaks. say: what a person reads. device: of the small tensors that ranks exchange. save_interval: in steps.
    """

    def __init__(
        self, policy: BadLossPolicy, state: TrainingState, folder: Path | None, *, is_recorder: bool,
        say: Callable[[str], None], device: str, save_interval: int | None = None,
    ):  # fmt: skip
        self.policy, self.state, self._save_interval = policy, state, save_interval
        self._first_iteration: int | None = None
        self._is_recorder, self._say, self._device = is_recorder, say, device
        self._path = None if folder is None else folder / SKIPPED_BATCHES_FILE
        self._known = {} if self._path is None else {batch.num_samples: batch for batch in read_skipped(self._path)}
        self._good_losses: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._file: LineFile | None = None
        self._num_in_a_row = 0
        self._recent: deque[tuple[int, int]] = deque(maxlen=policy.num_rolled_back)
        self._step = self._num_samples = 0
        self._norms: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._failure: BadStepError | None = None
        self._roll_back: str | None = None

    def begin_step(self, step: int) -> None:
        """step: counted from 1."""
        if self._first_iteration is None:
            self._first_iteration = step - 1
        self._step, self._num_samples = step, self.state.num_samples
        self._recent.append((self._step, self._num_samples))
        self._norms.clear()
        self._losses.clear()

    def add_norm(self, norm: Tensor) -> None:
        """A norm of this rank's own gradients, before they are summed over ranks."""
        self._norms.append(norm)

    def add_loss(self, loss_and_count: Tensor) -> None:
        """[sum of losses, number of tokens] of one micro-batch."""
        self._losses.append(loss_and_count)

    def permits_update(self) -> bool:
        """Whether the optimizer may apply the gradients of this step; the same on every rank (a collective)."""
        num_bad, num_skipping, loss_sum, num_tokens = self._read_numbers().tolist()
        loss = loss_sum / num_tokens if num_tokens else None
        if num_skipping:
            self._report_known()
            return False
        reason = None
        if num_bad:
            reason = self._ask_ranks()
        elif loss is not None and self._is_spike(loss):
            median = statistics.median(self._good_losses)
            reason = (
                f"loss {loss:.4f} is above {self.policy.spike_factor:g} times {median:.4f}, the median of the last "
                f"{len(self._good_losses)} steps"
            )
        if reason is None:
            self._num_in_a_row = 0
            if loss is not None:
                self._good_losses.append(loss)
            return True
        self._act(reason)
        return False

    @property
    def has_ended_run(self) -> bool:
        return self._failure is not None or self._roll_back is not None

    def must_save(self) -> bool:
        """Whether the run that this judge ended has steps that no checkpoint has, and will not go back before them."""
        iteration = self._step - 1
        is_saved = iteration == self._first_iteration or (self._save_interval and iteration % self._save_interval == 0)
        return self._path is not None and self._roll_back is None and self._num_in_a_row == 0 and not is_saved

    def end_run(self) -> None:
        """Raise what ends the run, BadStepError or SystemExit for a roll-back; nothing if the judge did not end it."""
        if self._failure is not None:
            raise self._failure
        if self._roll_back is not None:
            write_note(self._roll_back)
            sys.exit(ROLLED_BACK_EXIT_CODE)

    def _read_numbers(self) -> Tensor:
        """[ranks with bad values, ranks that skip this batch, sum of losses, tokens] over all ranks."""
        values = [norm.reshape(1).float() for norm in self._norms] + [loss[:1].float() for loss in self._losses]
        numbers = torch.zeros(4, device=self._device)
        if values:
            numbers[0] = (~torch.isfinite(torch.cat(values))).any()
        numbers[1] = self._num_samples in self._known
        if self._losses:
            # Each loss is there as often as ranks share it, like its tokens; so their quotient is the mean loss.
            numbers[2:] = torch.stack(self._losses).float().sum(dim=0)
        torch.distributed.all_reduce(numbers)
        return numbers

    def _is_spike(self, loss: float) -> bool:
        has_median = len(self._good_losses) >= MIN_MEDIAN_STEPS
        factor = self.policy.spike_factor
        return factor is not None and has_median and loss > factor * statistics.median(self._good_losses)

    def _ask_ranks(self) -> str:
        """Which ranks have which bad values: 'rank 3 (host b): loss is nan'."""
        own = [f"loss is {float(loss[0])}" for loss in self._losses if not math.isfinite(float(loss[0]))][:1]
        own += [f"norm of its gradients is {float(norm)}" for norm in self._norms if not math.isfinite(float(norm))][:1]
        answers = gather_from_ranks((socket.gethostname(), own))
        found = [
            f"rank {rank} ({host}): {' and '.join(values)}" for rank, (host, values) in enumerate(answers) if values
        ]
        more = f" and {len(found) - REASONS_SHOWN} ranks more" if len(found) > REASONS_SHOWN else ""
        return "; ".join(found[:REASONS_SHOWN]) + more

    def _act(self, reason: str) -> None:
        what = f"step {self._step}: loss and gradient must be usable, got {reason}"
        if self.policy.action == "skip-batch":
            self._num_in_a_row += 1
            if self._num_in_a_row <= MAX_SKIPPED_IN_A_ROW:
                self._record([(self._step, self._num_samples)], reason)
                self._tell(f"{what}. The batch is skipped: the optimizer does not step.")
                return
            self._failure = BadStepError(
                f"{what}. The {MAX_SKIPPED_IN_A_ROW} steps before it were skipped too, so the weights are at fault: "
                f"remove their lines from {SKIPPED_BATCHES_FILE} and continue from an earlier checkpoint (--ckpt-step)."
            )
        elif self.policy.action == "roll-back":
            self._record(list(self._recent), reason)
            first = self._recent[0][0]
            self._roll_back = (
                f"{what}. Rolled back: the run ends, starts again from its newest checkpoint, and leaves out the "
                f"batches of steps {first} to {self._step} that come after it."
            )
            self._tell(self._roll_back)
        else:
            self._failure = BadStepError(
                f"{what}. No weight was changed by it. Look at the batch (its first sample is number "
                f"{self._num_samples}), the learning rate and the host, and continue with the same command; "
                "--on-bad-loss skip-batch or roll-back go on without it."
            )

    def _report_known(self) -> None:
        batch = self._known.get(self._num_samples)
        if batch is not None:
            self._tell(f"step {self._step}: the batch is skipped, as before: {batch.reason}")

    def _record(self, batches: Sequence[tuple[int, int]], reason: str) -> None:
        found = [
            SkippedBatch(step=step, num_samples=num_samples, reason=reason)
            for step, num_samples in batches
            if num_samples not in self._known
        ]
        self._known.update((batch.num_samples, batch) for batch in found)
        if self._path is None or not self._is_recorder:
            return
        if self._file is None:
            self._file = LineFile(self._path)
        for batch in found:
            self._file.append(asdict(batch))
        if self._file.failure is not None:
            self._say(f"warning: {self._file.failure}")

    def _tell(self, sentence: str) -> None:
        if self._is_recorder:
            self._say(sentence)


def read_skipped(path: Path) -> list[SkippedBatch]:
    """The batches that a run must skip; none without the file. Raises CheckpointError with path and line."""
    if not path.exists():
        return []
    return read_json_lines(path, SkippedBatch, remedy="Remove the line.", raises=CheckpointError)
