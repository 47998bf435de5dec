"""Compares two checkpoints tensor by tensor: missing tensors, and differences of shape, dtype or value.

Either side may be Megatron's at any layout or a Hugging Face folder. Vocabulary padding is never compared. Differences
of the saved arguments are listed, but they do not change the verdict.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, read_config, read_hf_model
from megatron_hammer.checkpoint.inspection.tensor_views import (
    OpenedCheckpoint,
    TensorView,
    describe_architecture,
    view_as_hugging_face,
    view_by_table_names,
    view_store,
)
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
from megatron_hammer.checkpoint_files.checkpoint_reader import OPTIMIZER_PREFIXES, VOCABULARY_TENSORS, name_dtype
from megatron_hammer.errors import CheckpointError
from megatron_hammer.files.read import is_present

Kind = Literal["missing", "unexpected", "shape", "dtype", "value"]
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of fp32; the intermediate tensors of a comparison are of this size


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """kind: "missing" in the second, "unexpected" there, or what differs. first, second: shape and dtype of each.

    max_difference: absolute, NaN where one side has a NaN that the other has not; None where it was not computed.
    """

    name: str
    kind: Kind
    first: str | None
    second: str | None
    max_difference: float | None = None
    num_different: int | None = None
    num_elements: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArgumentDifference:
    """A saved argument, or a field of config.json or of the architecture, as each side has it."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The result; `num_compared` counts tensors that both sides have in one shape."""

    first: str
    second: str
    num_compared: int
    num_equal: int
    differences: tuple[TensorDifference, ...]
    arguments: tuple[ArgumentDifference, ...]

    @property
    def is_equal(self) -> bool:
        return not self.differences


def compare_checkpoints(
    first: OpenedCheckpoint,
    second: OpenedCheckpoint,
    *,
    ignores_dtype: bool = False,
    has_optimizer: bool = False,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare every tensor of two opened checkpoints, one at a time.

    ignores_dtype: two dtypes are no difference, and values are compared in the one with fewer bits.
    has_optimizer: also the optimizer's state of two torch_dist checkpoints.
    Raises HammerError where a tensor cannot be read, the architecture cannot be mapped, or there is no such state.
    """
    first_views, second_views = match_names(first, second)
    if has_optimizer:
        first_views, second_views = first_views | view_optimizer(first), second_views | view_optimizer(second)
    differences = []
    names = sorted(first_views.keys() | second_views.keys())
    num_compared = num_equal = 0
    for number, name in enumerate(names, start=1):
        difference = compare_tensors(name, first_views.get(name), second_views.get(name), ignores_dtype=ignores_dtype)
        is_comparable = difference is None or difference.kind in ("dtype", "value")
        # dtype and value differences were computed over all elements; missing, unexpected and shape could not be.
        num_compared += is_comparable
        num_equal += difference is None
        if difference is not None:
            differences.append(difference)
        on_tensor(number, len(names))
    return Comparison(
        first=first.label,
        second=second.label,
        num_compared=num_compared,
        num_equal=num_equal,
        differences=tuple(differences),
        arguments=tuple(compare_arguments(first, second)),
    )


def match_names(
    first: OpenedCheckpoint, second: OpenedCheckpoint
) -> tuple[dict[str, TensorView], dict[str, TensorView]]:
    """The weights of both sides under names of one kind, without vocabulary padding."""
    # Two sides of one kind have the same names already. Only a mixed pair needs the mapping, and so a supported family.
    if first.is_megatron and second.is_megatron:
        return _without_padding(first), _without_padding(second)
    if not first.is_megatron and not second.is_megatron:
        return first.views, second.views
    folder = read_hf_model((second if first.is_megatron else first).directory)
    left, right = (
        view_as_hugging_face(side, folder) if side.is_megatron else view_by_table_names(side, folder)
        for side in (first, second)
    )
    return left, right


def _without_padding(opened: OpenedCheckpoint) -> dict[str, TensorView]:
    # None if the saved run did not know it. Then padding cannot be told from tokens, and it is compared too.
    vocab_size = getattr(opened.reader.args, "vocab_size", None)
    if not vocab_size:
        return opened.views
    return {
        name: crop_rows(view, vocab_size) if name in VOCABULARY_TENSORS else view for name, view in opened.views.items()
    }


def crop_rows(view: TensorView, num_rows: int) -> TensorView:
    """The first rows of a tensor; one that has no more stays as it is."""
    if not view.shape or view.shape[0] <= num_rows:
        return view
    # `read` keeps the padding until then: a view promises its shape before anything is read.
    return TensorView(shape=(num_rows, *view.shape[1:]), dtype=view.dtype, read=lambda: view.read()[:num_rows])


def view_optimizer(opened: OpenedCheckpoint) -> dict[str, TensorView]:
    """The optimizer's tensors by their keys, without vocabulary padding; raises CheckpointError if there are none."""
    store = opened.store
    # Legacy files keep the optimizer by rank, in the layout of the run, so it can be compared for torch_dist only.
    views = {} if store is None else view_store(store)
    chosen = {key: view for key, view in views.items() if key.startswith(OPTIMIZER_PREFIXES)}
    if not chosen:
        raise CheckpointError(
            f"{opened.directory}: must hold the optimizer's state as torch_dist has it, got none. "
            "Compare without --optimizer."
        )
    vocab_size = getattr(opened.reader.args, "vocab_size", None)
    return {
        key: crop_rows(view, vocab_size) if vocab_size and key.endswith(VOCABULARY_TENSORS) else view
        for key, view in chosen.items()
    }


# --- tensors ---------------------------------------------------------------------------------------------------------


def compare_tensors(
    name: str, first: TensorView | None, second: TensorView | None, *, ignores_dtype: bool = False
) -> TensorDifference | None:
    """What differs, None if nothing does."""
    texts = (_describe(first), _describe(second))
    if first is None or second is None:
        return TensorDifference(
            name=name, kind="unexpected" if first is None else "missing", first=texts[0], second=texts[1]
        )
    # Before the read: tensors of other shapes need not be in memory to be told apart.
    if first.shape != second.shape:
        return TensorDifference(name=name, kind="shape", first=texts[0], second=texts[1])
    left, right = first.read(), second.read()
    if is_bitwise_equal(left, right):  # many times faster than the measurement
        return None
    max_difference, num_different = count_differences(left, right, rounds_to_narrower=ignores_dtype)
    # A dtype difference carries the largest difference of the values as well: rounding alone shows as a small one.
    is_other_dtype = first.dtype != second.dtype and not ignores_dtype
    if num_different == 0 and not is_other_dtype:
        return None
    return TensorDifference(
        name=name,
        kind="dtype" if is_other_dtype else "value",
        max_difference=max_difference,
        num_different=num_different,
        num_elements=first.num_elements,
        first=texts[0],
        second=texts[1],
    )


def _describe(view: TensorView | None) -> str | None:
    return None if view is None else f"{tuple(view.shape)} {name_dtype(view.dtype)}"


def count_differences(first: Tensor, second: Tensor, *, rounds_to_narrower: bool = False) -> tuple[float, int]:
    """(largest absolute difference, number of different elements) of two tensors of one shape.

    Two NaNs are equal, and so are two infinities of one sign. Works through pieces, so that no copy of a whole tensor
    is made.
    """
    narrower = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    largest, num_different = 0.0, 0
    for left, right in zip(_split(first), _split(second), strict=True):
        if rounds_to_narrower:
            left, right = left.to(narrower), right.to(narrower)
        # fp32 holds every bf16 and fp16 number exactly, so the difference is that of the stored values.
        wide = torch.float64 if torch.float64 in (left.dtype, right.dtype) else torch.float32
        left, right = left.to(wide), right.to(wide)
        # NaN is not equal to itself, so two NaNs would count as a difference. Two infinities need no such rule.
        is_different = (left != right) & ~(left.isnan() & right.isnan())
        count = int(is_different.sum())
        if count:
            num_different += count
            # Only where they differ: infinity minus infinity would be NaN.
            apart = (left - right)[is_different].abs()
            largest = torch.cat([apart, apart.new_tensor([largest])]).max().item()  # torch's max keeps NaN
    return largest, num_different


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(_CHUNK_ELEMENTS) if tensor.numel() else ()


# --- arguments -------------------------------------------------------------------------------------------------------


def compare_arguments(first: OpenedCheckpoint, second: OpenedCheckpoint) -> Iterator[ArgumentDifference]:
    """What the two descriptions differ in: saved arguments, config.json, or the architectures where they are of two
    kinds.
    """
    if first.is_megatron and second.is_megatron:
        sides = (_list_arguments(first), _list_arguments(second))
    elif first.is_megatron or second.is_megatron:
        sides = (describe_architecture(first), describe_architecture(second))
    else:
        sides = (_list_config(first), _list_config(second))
    yield from diff_values(*sides)


def diff_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[ArgumentDifference]:
    """Every name whose values are spelt differently, in alphabetical order."""
    for name in sorted(first.keys() | second.keys()):
        texts = [repr(side[name]) if name in side else "absent" for side in (first, second)]
        if texts[0] != texts[1]:
            yield ArgumentDifference(name=name, first=texts[0], second=texts[1])


def _list_arguments(opened: OpenedCheckpoint) -> dict[str, Any]:
    """iteration: of the state, in place of where the run had begun."""
    return {**vars(opened.reader.saved_args), "iteration": opened.reader.iteration}


def _list_config(opened: OpenedCheckpoint) -> dict[str, Any]:
    path = opened.directory / CONFIG_NAME
    return read_config(path) if is_present(path) else {}
