"""What Megatron's loop changes while it trains, read from its arguments; everything else about a run is in its plan."""

import argparse
from typing import Any

from megatron_hammer.checkpoint_files.saved_arguments import TOKENIZER_HASH
from megatron_hammer.data.order.review import Record

RECORD_NAME = "data_order_record"


class TrainingState:
    """A view of Megatron's own arguments after `finalize_arguments`."""

    def __init__(self, namespace: argparse.Namespace):
        self._namespace = namespace

    @property
    def iteration(self) -> int:
        """Steps that the weights have been trained for when this process starts; 0 before the checkpoint is loaded."""
        return getattr(self._namespace, "iteration", 0)

    def load_iteration(self, iteration: int | None) -> None:
        """Have megatron's loader take this iteration; None: a release."""
        self._namespace.ckpt_step = iteration

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; Megatron fills them in for a run that is counted in samples."""
        return self._namespace.train_iters

    @property
    def num_samples(self) -> int:
        """Training samples drawn so far."""
        return getattr(self._namespace, "consumed_train_samples", 0)

    @property
    def num_validation_samples(self) -> int:
        return getattr(self._namespace, "consumed_valid_samples", 0)

    @property
    def global_batch_size(self) -> int:
        """Of the present step; --step-batch-size-schedule changes it."""
        return self._namespace.global_batch_size

    @property
    def num_validation_sets(self) -> int:
        """Megatron keeps a list of lengths where it evaluates whole sets one by one."""
        # A number before the first whole pass, a list afterwards.
        lengths: Any = self._namespace.eval_iters
        return len(lengths) if isinstance(lengths, list) else 1

    @property
    def data_order(self) -> Record | None:
        """The record of the data order, which Megatron saves with its arguments in every checkpoint."""
        return getattr(self._namespace, RECORD_NAME, None)

    @data_order.setter
    def data_order(self, record: Record | None) -> None:
        setattr(self._namespace, RECORD_NAME, record)

    def record_tokenizer(self, sha256: str | None) -> None:
        """Save this hash of the tokenizer with every checkpoint, by which an export knows it again."""
        setattr(self._namespace, TOKENIZER_HASH, sha256)
