"""The mean of several checkpoints' weights, as a release without an optimizer.

Each element is (w1*x1 + w2*x2 + ...) / (w1 + w2 + ...), computed in fp32 in the order given: products, sums and at the
end a quotient, each rounded once; the result is rounded once more to the weights' dtype. With equal weights, which are
taken as 1, no product is rounded; then the sum of up to 256 bf16 numbers of one magnitude is not rounded either.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.argument_effects import EXPRESSED, EXPRESSIBLE
from megatron_hammer.checkpoint.surgery.rewriting import (
    OnTensor,
    PlannedCheckpoint,
    PlannedTensor,
    copy_objects,
    write_planned_checkpoint,
)
from megatron_hammer.checkpoint.surgery.training_checkpoint import TrainingCheckpoint, open_training_checkpoint
from megatron_hammer.checkpoint.surgery.weights_only import build_release_state
from megatron_hammer.checkpoint_files.checkpoint_reader import BUFFER_ENDINGS
from megatron_hammer.checkpoint_files.saved_arguments import complete_arguments
from megatron_hammer.errors import ConversionError

# What the weights mean: two models that differ in one of these are not the same function of their tensors. Left out is
# what is only about the training: initialisation, dropout, the loss of the routers, and the choice of kernels.
_MODEL_ARGUMENTS = tuple(
    sorted(
        (EXPRESSED | EXPRESSIBLE.keys())
        - {"init_method_std", "bias_gelu_fusion", "attention_dropout", "hidden_dropout", "moe_aux_loss_coeff"}
        - {"moe_router_load_balancing_type", "rope_type"}
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageReport:
    """What was written. sources: the folders and their weights, which sum to 1."""

    save_dir: Path
    sources: tuple[tuple[Path, float], ...]
    num_weights: int
    num_parameters: int
    elapsed_s: float


def average(
    load_dirs: Sequence[Path],
    save_dir: Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    on_tensor: OnTensor = lambda stage, done, total: None,
) -> AverageReport:
    """Write `save_dir/release` with the mean, complete and recomputed, or nothing.

    load_dirs: folders given to --save (their latest iteration) or iterations of one. weights: one each (all equal).
    Raises ConversionError for weights that make no mean, and one sentence for every difference between the models.
    """
    started_at_s = time.monotonic()
    # Before any checkpoint is opened: a wrong number of weights costs no reading.
    shares = _validate_weights(load_dirs, weights)
    checkpoints = [open_training_checkpoint(path) for path in load_dirs]
    _refuse_repeated(checkpoints)
    _validate_same_model(checkpoints)
    first = checkpoints[0]
    planned = PlannedCheckpoint(
        tensors=[_plan_mean(checkpoints, shares, key) for key in first.model],
        # Extra states (scaling factors of fp8) have no mean, so those of the first checkpoint are kept.
        objects=copy_objects(first, first.list_model_objects()),
        common_state=build_release_state(first),
        iteration=None,
    )
    write_planned_checkpoint(save_dir, planned, on_tensor, sources=checkpoints, overwrite=overwrite)
    return AverageReport(
        save_dir=save_dir,
        sources=tuple(
            (checkpoint.directory, share / math.fsum(shares))
            for checkpoint, share in zip(checkpoints, shares, strict=True)
        ),
        num_weights=len(first.model),
        num_parameters=sum(
            math.prod(stored.shape) for key, stored in first.model.items() if not key.endswith(BUFFER_ENDINGS)
        ),
        elapsed_s=time.monotonic() - started_at_s,
    )


def mean_of(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean in the dtype of `parts`, as this module's docstring defines it."""
    # fp32: in bf16, with 8 bits, every addition would round.
    total = torch.zeros(parts[0].shape, dtype=torch.float32)
    for part, share in zip(parts, shares, strict=True):
        total += part.float() * share
    # fsum is exact, so the order of the weights does not change the divisor.
    return (total / math.fsum(shares)).to(parts[0].dtype)


def _plan_mean(checkpoints: Sequence[TrainingCheckpoint], shares: Sequence[float], key: str) -> PlannedTensor:
    stored = checkpoints[0].model[key]

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        return mean_of([checkpoint.store.read(key, offsets, sizes) for checkpoint in checkpoints], shares)

    return PlannedTensor(
        key=key,
        shape=stored.shape,
        dtype=stored.dtype,
        # The cuts of the first checkpoint. The others may be cut in other ways: a read assembles any box.
        boxes=[(chunk.offsets, chunk.sizes) for chunk in stored.chunks],
        read=read,
    )


def _validate_weights(load_dirs: Sequence[Path], weights: Sequence[float] | None) -> tuple[float, ...]:
    if len(load_dirs) < 2:
        raise ConversionError(f"checkpoints: must be at least two, got {len(load_dirs)}. Name another.")
    if weights is None:
        return (1.0,) * len(load_dirs)
    if len(weights) != len(load_dirs):
        raise ConversionError(
            f"weights: must be one for each checkpoint, got {len(weights)} for {len(load_dirs)} checkpoints. "
            "Pass as many."
        )
    # Single weights may be negative; only their sum is a divisor.
    # sum and not fsum, which raises where the sum is beyond the largest number.
    if not all(math.isfinite(weight) for weight in weights) or not 0 < sum(weights) < math.inf:
        raise ConversionError(
            f"weights: must be finite numbers with a positive sum, got {', '.join(map(str, weights))}. Change them."
        )
    return tuple(weights)


def _refuse_repeated(checkpoints: Sequence[TrainingCheckpoint]) -> None:
    """By another spelling or a link, a checkpoint would count twice while all weights look equal."""
    names: dict[Path, Path] = {}
    for directory in [checkpoint.directory for checkpoint in checkpoints]:
        if (known := names.setdefault(directory.resolve(), directory)) is not directory:
            raise ConversionError(
                f"{directory}: checkpoint must be named once, got it as {known} too. "
                "Drop one, and give the other more of the --weights."
            )


def _validate_same_model(checkpoints: Sequence[TrainingCheckpoint]) -> None:
    """Every difference of an argument, a name, a shape or a dtype is one sentence."""
    first = checkpoints[0]
    problems = []
    for other in checkpoints[1:]:
        where = f"in {other.directory}, unlike {first.directory}"
        for name in _MODEL_ARGUMENTS:
            before, now = _argument(first, name), _argument(other, name)
            if before != now:
                problems.append(
                    f"{name}: must be the same in all checkpoints, got {now} {where}: {before}. Leave it out."
                )
        for key in sorted(first.model.keys() | other.model.keys()):
            before, now = _describe(first, key), _describe(other, key)
            if before != now:
                problems.append(
                    f"{key}: must be the same in all checkpoints, got {now} {where}: {before}. Leave it out."
                )
    if problems:
        raise ConversionError(*problems)


def _argument(checkpoint: TrainingCheckpoint, name: str) -> Any:
    # Completed, so checkpoints of different versions of Megatron compare; False, 0 and absent mean the same.
    return getattr(complete_arguments(checkpoint.args), name, None) or None


def _describe(checkpoint: TrainingCheckpoint, key: str) -> str:
    stored = checkpoint.model.get(key)
    return "no such tensor" if stored is None else f"{stored.shape} {stored.dtype}"
