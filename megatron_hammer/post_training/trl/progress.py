"""One line on stderr for every log of the training; a loss that is not a number ends it, as does a warm-up that
outlasts it.
"""

import math
import sys
from typing import Any

from transformers import TrainerCallback

from megatron_hammer.errors import ConfigError, DataError

SHOWN = {"loss": "loss", "learning_rate": "lr", "accuracy": "accuracy", "rewards/accuracies": "accuracy"}


class ShowProgress(TrainerCallback):
    """Prints step, loss, learning rate and, of preferences, the share in which the chosen answer wins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Only here is the number of steps known, where the recipe counts epochs."""
        if args.warmup_steps >= state.max_steps:
            raise ConfigError(
                f"lr_warmup_steps: must be below the {state.max_steps:,} steps of the training, got "
                f"{args.warmup_steps:g}: lr would never be reached. Lower it, or train longer."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> Any:
        """The last step is logged whatever log_interval is, so that its loss is checked and reported."""
        control.should_log |= state.global_step >= state.max_steps
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        """Called by transformers on every process."""
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DataError(
                f"loss: must be finite, got {loss} in step {state.global_step}. Lower lr, or look at the data."
            )
        if state.is_world_process_zero:
            values = "  ".join(f"{label} {float(logs[name]):.4g}" for name, label in SHOWN.items() if name in logs)
            print(f"step {state.global_step}/{state.max_steps}  {values}", file=sys.stderr, flush=True)
