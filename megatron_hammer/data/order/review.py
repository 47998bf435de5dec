"""The order of a resumed run against its checkpoint's, and the record of it that checkpoints carry.

The record is an attribute of Megatron's arguments, which are part of every checkpoint. So no checkpoint is complete
without it, whenever a run is killed. A checkpoint without a record, as Megatron-LM writes, is judged by its settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hammer.data.order.change import Segment, is_continued, match_sources
from megatron_hammer.data.order.order import DataOrder
from megatron_hammer.data.order.run_order import OrderSettings, plan_run_order, plan_saved_order
from megatron_hammer.errors import DataError

# A later version is read as no record: its meaning is not known.
RECORD_VERSION = 1
OTHER_VALIDATION = "the order of the validation samples has changed"

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedOrder:
    """What a checkpoint says of its order. num_consumed: training samples drawn so far, in that order.

    settings: None where another version of Megatron saved them. record: None where there is none.
    """

    num_consumed: int
    settings: OrderSettings | None
    record: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderReview:
    """A resumed run's order against the checkpoint's. history: what was trained on, oldest first; empty: not known.

    is_recorded: whether the checkpoint says which data it was trained on. is_evaluated_alike: whether the order of the
    validation samples is unchanged.
    """

    num_consumed: int
    new: Segment
    history: tuple[Segment, ...]
    is_recorded: bool
    is_same: bool
    is_evaluated_alike: bool

    @property
    def old(self) -> DataOrder:
        """The order that the checkpoint was last trained in."""
        return self.history[-1].order


def review_order(
    settings: OrderSettings, saved: SavedOrder, *, last_sample: int, last_validation_sample: int
) -> OrderReview | None:
    """Compare the two orders; None without data. last_*: where in its orders the resumed run ends."""
    order = plan_run_order(settings, last_sample=last_sample, is_identified=True)
    if order is None:
        return None
    history, is_recorded = read_history(saved, order)
    new = Segment(order=order, keys=match_sources(order, order)[1], first_sample=0, last_sample=last_sample)
    return OrderReview(
        num_consumed=saved.num_consumed,
        new=new,
        history=history,
        is_recorded=is_recorded,
        is_same=bool(history) and is_continued(history[-1], new),
        is_evaluated_alike=_is_evaluated_alike(settings, saved.settings, last_validation_sample),
    )


def _is_evaluated_alike(settings: OrderSettings, saved: OrderSettings | None, last_sample: int) -> bool:
    """Whether validation continues in the same order, as far as the settings and files of both tell."""
    old = None if saved is None else plan_run_order(saved, split="valid")
    new = plan_run_order(settings, split="valid", last_sample=last_sample)
    if old is None or new is None:
        return True
    keys = match_sources(old, new)
    segments = [
        Segment(order=order, keys=keys_of, first_sample=0, last_sample=min(old.num_available, new.num_available))
        for order, keys_of in zip((old, new), keys, strict=True)
    ]
    return is_continued(*segments)


def read_history(saved: SavedOrder, new: DataOrder) -> tuple[tuple[Segment, ...], bool]:
    """What the checkpoint was trained on, and whether it says so itself."""
    starts, orders, is_recorded = _read_record(saved.record)
    if not is_recorded:
        order = None if saved.settings is None else plan_saved_order(saved.settings, new)
        starts, orders = ([0], [order]) if order is not None else ([], [])
    segments = []
    for place, order in enumerate(orders):
        # A part ends where the next one begins, and the last one ends at the checkpoint.
        last = starts[place + 1] if place + 1 < len(starts) else saved.num_consumed
        last = min(last, saved.num_consumed)
        if starts[place] < last or place == 0:
            keys = match_sources(order, new)[0]
            # A source that the new order does not read counts as another one in each segment.
            keys = tuple(key if key < len(new.sources) else key + 1000 * place for key in keys)
            segments.append(Segment(order=order, keys=keys, first_sample=starts[place], last_sample=last))
    return tuple(segments), is_recorded


def _read_record(record: Any) -> tuple[list[int], list[DataOrder], bool]:
    """(first sample, order) of each part of a run whose order was changed on the way; whether there is a record."""
    try:
        if record is None or record["version"] > RECORD_VERSION:
            return [], [], False
        segments = record["segments"]
        orders = [DataOrder.from_json(segment["order"]) for segment in segments]
        return [int(segment["first_sample"]) for segment in segments], orders, True
    # The record is an attribute of unpickled arguments, so it may be anything.
    except (KeyError, TypeError, DataError):
        return [], [], False


# --- the record -----------------------------------------------------------------------------------------------------


def build_record(settings: OrderSettings, review: OrderReview | None) -> Record | None:
    """What a run's checkpoints say of its order: the history of the checkpoint it resumes, continued.

    review: None where nothing is resumed. None without data.
    """
    order = review.new.order if review is not None else plan_run_order(settings, is_identified=True)
    if order is None:
        return None
    segments: list[dict[str, Any]] = []
    first_sample = 0
    if review is not None:
        # An unchanged order continues the last part; a changed one begins a new part.
        kept = review.history[:-1] if review.is_same else review.history
        segments = [{"first_sample": segment.first_sample, "order": segment.order.to_json()} for segment in kept]
        first_sample = review.history[-1].first_sample if review.is_same else review.num_consumed
    segments.append({"first_sample": first_sample, "order": order.to_json()})
    alike = review is None or review.is_evaluated_alike
    return {"version": RECORD_VERSION, "segments": segments, "is_evaluated_alike": alike}


def describe_continuation(record: Mapping[str, Any] | None, num_consumed: int) -> str | None:
    """One line for a run that resumes after `num_consumed` samples; None for a new run, or without a record."""
    if record is None or num_consumed == 0:
        return None
    starts = [segment["first_sample"] for segment in record["segments"]]
    if starts == [num_consumed]:
        return f"data order: recorded from sample {num_consumed:,}; the checkpoint does not tell its own"
    validation = "" if record["is_evaluated_alike"] else f"; {OTHER_VALIDATION}"
    if starts[-1] == num_consumed:
        return f"data order: changed after sample {num_consumed:,}, as accepted{validation}"
    return f"data order: as in the checkpoint{validation}"
