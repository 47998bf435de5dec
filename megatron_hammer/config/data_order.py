"""The order of a run's training samples, from its arguments, and the record of it that its checkpoints carry.

The record is an attribute of Megatron's arguments, which are part of every checkpoint: so no checkpoint is complete
without it, whenever a run is killed. A checkpoint without it, as Megatron-LM writes, is judged by its arguments alone.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hammer.config.data_flags import read_data_plan
from megatron_hammer.config.samples import count_needed_samples, select_global_batch_size
from megatron_hammer.config.saved_run import SavedRun, read_saved_run
from megatron_hammer.data.indexed.pair import IndexSummary, read_index
from megatron_hammer.data.order.change import Segment, is_continued, match_sources
from megatron_hammer.data.order.identity import count_source, identify_source
from megatron_hammer.data.order.order import EPOCHWISE, MEGATRON, DataOrder, TrainingSource, plan_order
from megatron_hammer.data.sources import SPLIT_NAMES, DataSource, count_split_tokens
from megatron_hammer.errors import DataError

RECORD_NAME = "data_order_record"
RECORD_VERSION = 1
OTHER_VALIDATION = "the validation samples are others than before"


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderReview:
    """A resumed run's order against the checkpoint's. history: what was trained on, oldest first; empty: not known.

    is_recorded: whether the checkpoint says which data it was trained on. is_evaluated_alike: whether the validation
    samples come in the order of before.
    """

    saved: SavedRun
    new: Segment
    history: tuple[Segment, ...]
    is_recorded: bool
    is_same: bool
    is_evaluated_alike: bool

    @property
    def old(self) -> DataOrder:
        """The order that the checkpoint was last trained in."""
        return self.history[-1].order


# --- orders ---------------------------------------------------------------------------------------------------------


def plan_run_order(
    namespace: argparse.Namespace,
    *,
    split: str = "train",
    last_sample: int = 0,
    is_identified: bool = False,
    **replaced: Any,
) -> DataOrder | None:
    """The order of a run's samples; None without training on data that can be read.

    split: whose samples. last_sample: where in its order a resumed run ends. is_identified: read as much of the files
    as tells them from others. replaced: arguments to replace.
    """
    namespace = argparse.Namespace(**(vars(namespace) | replaced))
    plan, problems = read_data_plan(namespace)
    sources = plan.sources_of(split)
    if problems or not sources or namespace.skip_train or count_needed_samples(namespace)[split] < 1:
        return None
    try:
        indices = [read_index(source.prefix) for source in sources]
    except (DataError, OSError):
        return None
    return _plan_order(
        namespace,
        sources,
        indices,
        split=split,
        is_own=plan.own is not None,
        is_identified=is_identified,
        last_sample=last_sample,
    )


def plan_saved_order(saved: argparse.Namespace, new: DataOrder) -> DataOrder | None:
    """The order by a checkpoint's arguments alone; a source that is gone is taken for the new one in its place."""
    try:
        plan, problems = read_data_plan(saved)
        sources = plan.sources_of("train")
        if problems or not sources or count_needed_samples(saved)["train"] < 1:
            return None
        indices = []
        for place, source in enumerate(sources):
            try:
                indices.append(read_index(source.prefix))
            except (DataError, OSError):
                if len(sources) != len(new.sources):
                    return None
                indices.append(read_index(new.sources[place].prefix))
        return _plan_order(saved, sources, indices, is_own=plan.own is not None, is_identified=False)
    except (AttributeError, TypeError):  # saved by another version of Megatron, which had other arguments
        return None


def _plan_order(
    namespace: argparse.Namespace,
    sources: Sequence[DataSource],
    indices: Sequence[IndexSummary],
    *,
    is_own: bool,
    is_identified: bool,
    split: str = "train",
    last_sample: int = 0,
) -> DataOrder:
    is_blend = len(sources) > 1 or (not is_own and sources[0].weight is not None)
    bounds = (0.0, 1.0) if is_own else read_bounds(namespace.split, split)
    order = getattr(namespace, "data_order", MEGATRON)
    num_samples = count_needed_samples(namespace)[split]
    return plan_order(
        [
            _describe_source(
                source if is_blend else DataSource(prefix=source.prefix, weight=None), index, bounds, is_identified
            )
            for source, index in zip(sources, indices, strict=True)
        ],
        order=order,
        seed=namespace.seed,
        seq_length=namespace.seq_length,
        num_samples=max(num_samples, last_sample) if order == EPOCHWISE or split == "valid" else num_samples,
        order_samples=getattr(namespace, "data_order_samples", None) if split == "train" else None,
        split=None if is_own else namespace.split,
        surplus=namespace.mid_level_dataset_surplus,
        is_blend=is_blend,
        dataloader_type=namespace.dataloader_type or "single",
    )


def _describe_source(
    source: DataSource, index: IndexSummary, bounds: tuple[float, float], is_identified: bool
) -> TrainingSource:
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    return TrainingSource(
        prefix=source.prefix,
        weight=source.weight,
        first_sequence=first,
        last_sequence=last,
        epoch_tokens=count_split_tokens(index, bounds),
        identity=identify_source(source.prefix, index) if is_identified else count_source(index),
    )


def read_bounds(shares: str, split: str) -> tuple[float, float]:
    """Where a split begins and ends in each source, as shares, to the last bit as megatron-core has them."""
    from megatron.core.datasets import blended_megatron_dataset_config as config

    matrix: list[tuple[float, float]] = config.convert_split_vector_to_split_matrix(
        config.parse_and_normalize_split(shares)
    )
    return matrix[SPLIT_NAMES.index(split)]


# --- what a checkpoint says -----------------------------------------------------------------------------------------


def review_order(namespace: argparse.Namespace) -> OrderReview | None:
    """Compare the order of a run that resumes with the checkpoint's; None where nothing resumes or has no data."""
    saved = read_saved_run(namespace)
    if saved is None:
        return None
    last_sample = count_last_sample(namespace, saved.iteration, saved.num_consumed)
    order = plan_run_order(namespace, last_sample=last_sample, is_identified=True)
    if order is None:
        return None
    history, is_recorded = read_history(saved, order)
    new = Segment(order=order, keys=match_sources(order, order)[1], first_sample=0, last_sample=last_sample)
    is_same = bool(history) and is_continued(history[-1], new)
    return OrderReview(
        saved=saved,
        new=new,
        history=history,
        is_recorded=is_recorded,
        is_same=is_same,
        is_evaluated_alike=is_evaluated_alike(namespace, saved),
    )


def is_evaluated_alike(namespace: argparse.Namespace, saved: SavedRun) -> bool:
    """Whether validation goes on in the order of before, as far as the arguments and files of both tell."""
    consumed = getattr(saved.args, "consumed_valid_samples", 0)
    last_sample = count_last_validation_sample(namespace, saved.iteration, consumed)
    try:
        old = plan_run_order(saved.args, split="valid")
        new = plan_run_order(namespace, split="valid", last_sample=last_sample)
    except (AttributeError, TypeError):  # saved by another version of Megatron
        return True
    if old is None or new is None:
        return True
    keys = match_sources(old, new)
    segments = [
        Segment(order=order, keys=keys_of, first_sample=0, last_sample=min(old.num_available, new.num_available))
        for order, keys_of in zip((old, new), keys, strict=True)
    ]
    return is_continued(*segments)


def read_history(saved: SavedRun, new: DataOrder) -> tuple[tuple[Segment, ...], bool]:
    """What the checkpoint was trained on, and whether it says so itself."""
    starts, orders, is_recorded = _read_record(saved.args)
    if not is_recorded:
        order = plan_saved_order(saved.args, new)
        starts, orders = ([0], [order]) if order is not None else ([], [])
    segments = []
    for place, order in enumerate(orders):
        last = starts[place + 1] if place + 1 < len(starts) else saved.num_consumed
        last = min(last, saved.num_consumed)
        if starts[place] < last or place == 0:
            keys = match_sources(order, new)[0]
            # Sources that are read no longer are as many different ones in each segment.
            keys = tuple(key if key < len(new.sources) else key + 1000 * place for key in keys)
            segments.append(Segment(order=order, keys=keys, first_sample=starts[place], last_sample=last))
    return tuple(segments), is_recorded


def _read_record(saved: argparse.Namespace) -> tuple[list[int], list[DataOrder], bool]:
    """(first sample, order) of each part of a run that changed its order on the way, and whether there is a record."""
    record = getattr(saved, RECORD_NAME, None)
    try:
        if record is None or record["version"] > RECORD_VERSION:
            return [], [], False
        segments = record["segments"]
        orders = [DataOrder.from_json(segment["order"]) for segment in segments]
        return [int(segment["first_sample"]) for segment in segments], orders, True
    except (KeyError, TypeError):
        return [], [], False


def count_last_sample(namespace: argparse.Namespace, iteration: int, num_consumed: int) -> int:
    """Where in its order a run ends that goes on from there; the batch may have been another before."""
    batch = select_global_batch_size(namespace)
    if getattr(namespace, "step_batch_size_schedule", None):
        return max(num_consumed, count_needed_samples(namespace)["train"])
    num_steps = namespace.train_iters or (namespace.train_samples or 0) // batch
    return num_consumed + max(0, num_steps - iteration) * batch


def count_last_validation_sample(namespace: argparse.Namespace, iteration: int, num_consumed: int) -> int:
    """Where in its order a run's validation ends: an evaluation at each interval that is left, and one at the end."""
    if namespace.full_validation or not namespace.eval_iters or not namespace.train_iters:
        return 0
    an_evaluation = namespace.eval_iters * (namespace.eval_global_batch_size or select_global_batch_size(namespace))
    first = max(iteration, namespace.start_eval_at_iter or 0)
    num_left = namespace.train_iters // namespace.eval_interval - first // namespace.eval_interval + 1
    return num_consumed + max(0, num_left) * an_evaluation


# --- the record -----------------------------------------------------------------------------------------------------


def build_record(namespace: argparse.Namespace) -> dict[str, Any] | None:
    """What this run's checkpoints say about its order: the checkpoint's own history, continued. None without data."""
    review = review_order(namespace)
    order = review.new.order if review is not None else plan_run_order(namespace, is_identified=True)
    if order is None:
        return None
    segments: list[dict[str, Any]] = []
    first_sample = 0
    if review is not None:
        kept = review.history[:-1] if review.is_same else review.history
        segments = [{"first_sample": segment.first_sample, "order": segment.order.to_json()} for segment in kept]
        first_sample = review.history[-1].first_sample if review.is_same else review.saved.num_consumed
    segments.append({"first_sample": first_sample, "order": order.to_json()})
    alike = review is None or review.is_evaluated_alike
    return {"version": RECORD_VERSION, "segments": segments, "is_evaluated_alike": alike}


def describe_continuation(record: dict[str, Any] | None, num_consumed: int) -> str | None:
    """One line for a run that resumes after so many samples; None for one without a record."""
    if record is None or num_consumed == 0:
        return None
    starts = [segment["first_sample"] for segment in record["segments"]]
    if starts == [num_consumed]:
        return f"data order: recorded from sample {num_consumed:,} on, the checkpoint does not say its own"
    validation = "" if record["is_evaluated_alike"] else f"; {OTHER_VALIDATION}"
    if starts[-1] == num_consumed:
        return f"data order: changed after sample {num_consumed:,}, as accepted{validation}"
    return f"data order: as in the checkpoint{validation}"
