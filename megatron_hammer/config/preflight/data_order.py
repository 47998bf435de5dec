"""Whether a resumed run continues in the order of samples that its checkpoint was trained in.

Megatron skips as many samples as were consumed, of whatever order the present flags make. Here the two orders are
compared by what they draw, not by their flags. Where they differ, the tokens that come again or are never seen are
counted, and the run stops unless --accept-data-order-change is given.
"""

import dataclasses
from collections.abc import Iterator

from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.config.saved_run import SavedRun, review_resumed_order
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.order.change import Segment, SourceChange, count_change, is_continued, match_sources
from megatron_hammer.data.order.describe import list_order_changes
from megatron_hammer.data.order.order import EPOCHWISE, MEGATRON
from megatron_hammer.data.order.review import OTHER_VALIDATION, OrderReview
from megatron_hammer.data.order.run_order import plan_run_order

COUNTABLE_LOADER = "single"  # the others shuffle again, or are not Megatron's
ACCEPT = "pass --accept-data-order-change to continue in the new order"


def find_data_order_problems(plan: RunPlan) -> list[str]:
    """What would reorder the samples of a resumed run, or leave it without any; one process of each node checks."""
    if plan.machine.local_rank != 0:
        return []
    order = plan_run_order(plan.order)
    if order is None:
        return []
    problems = list(_find_pin_problems(plan))
    resumed = review_resumed_order(plan) if not problems else None
    if resumed is None or is_uncountable(plan):
        return problems
    saved, review = resumed
    problems += _find_shortage(review)
    if not review.is_same and review.history and not plan.data.accepts_order_change:
        problems.append(_describe_change(plan, saved, review))
    return problems


def is_uncountable(plan: RunPlan) -> bool:
    """Whether samples come in another order than the data set's."""
    return plan.data.dataloader_type != COUNTABLE_LOADER or plan.data.has_phases


def describe_order_state(plan: RunPlan) -> str | None:
    """The report's words for the order of samples; None without data."""
    order = plan_run_order(plan.order)
    if order is None:
        return None
    order_samples = plan.data.order_samples
    words = (order.rows or order.order) + ("" if order_samples is None else f", built for {order_samples:,} samples")
    resumed = review_resumed_order(plan)
    if resumed is None:
        return words
    saved, review = resumed
    name = saved.directory.name
    if is_uncountable(plan):
        return f"{words}; not compared with {name} (--dataloader-type or --phase-transition-iterations)"
    if not review.history:
        return f"{words}; not compared with {name}, whose arguments do not tell its data"
    if not review.is_same:
        accepted = ", accepted" if plan.data.accepts_order_change else ""
        return f"{words}; not as in the checkpoint ({name}){accepted}"
    return "; ".join([f"{words}; as in the checkpoint ({name})", *_list_notes(review)])


def _list_notes(review: OrderReview) -> Iterator[str]:
    if not review.is_evaluated_alike:
        yield OTHER_VALIDATION
    if not review.is_recorded:
        yield "the contents of the files were not compared, the checkpoint does not tell them"
    pairs = zip(review.old.sources, review.new.order.sources, strict=False)
    yield from (f"{old.prefix} is now {new.prefix}" for old, new in pairs if old.prefix != new.prefix)


# --- settings -------------------------------------------------------------------------------------------------------


def _find_pin_problems(plan: RunPlan) -> Iterator[str]:
    pinned, needed = plan.data.order_samples, plan.num_samples["train"]
    if pinned is None:
        return
    # Only Megatron's order ends there; the epochwise order continues with further epochs.
    if pinned < 1 or (plan.data.order == MEGATRON and pinned < needed):
        yield (
            f"data-order-samples: must be at least the {needed} samples that the run draws, got "
            f"data_order_samples={pinned}. Pass {needed} or more, or --data-order epochwise, which continues after "
            "them."
        )


def _find_shortage(review: OrderReview) -> list[str]:
    """Megatron stops in the middle where the samples end, as after a change of the batch."""
    order, last = review.new.order, review.new.last_sample
    if last <= order.num_available or last <= review.num_consumed:
        return []
    return [
        f"data-order: must hold all samples of the run, got {order.num_available} samples, {last} needed (the "
        f"checkpoint has drawn {review.num_consumed}, and --global-batch-size counts from there). Pass "
        f"--data-order-samples {last}, or --data-order epochwise, which has no end."
    ]


# --- a changed order ------------------------------------------------------------------------------------------------


def _describe_change(plan: RunPlan, saved: SavedRun, review: OrderReview) -> str:
    """One problem of a few sentences: what changed, what comes again and is skipped, by source, and what to do."""
    changes = "; ".join(list_order_changes(review.old, review.new.order)) or "another order of samples"
    sentences = [
        f"data-order: must be that of the checkpoint, got {changes} (in {saved.directory}).",
        *_describe_counts(review),
    ]
    if not review.is_recorded:
        sentences.append("The checkpoint does not tell its files, so their contents could not be compared.")
    remedy = find_keeping_flags(plan, review)
    keep = f"Pass {remedy}, which keeps the order" if remedy else "Change it back"
    return " ".join([*sentences, f"{keep}, or {ACCEPT}."])


def _describe_counts(review: OrderReview) -> list[str]:
    """How much comes again and is skipped, over all and by source."""
    num_consumed, new = review.num_consumed, review.new
    if review.old.rows is not None or new.order.rows is not None:
        return [f"{num_consumed:,} samples were trained on so far; which conversations come again is not counted."]
    # Another loader draws samples in an order that this package does not reproduce.
    if review.old.dataloader_type != COUNTABLE_LOADER:
        return [f"What comes again under --dataloader-type {review.old.dataloader_type} cannot be counted."]
    # A shorter run may end before what was already consumed, and no order can be read beyond its end.
    last = min(max(new.last_sample, num_consumed), new.order.num_available)
    first = min(num_consumed, last)
    lengths = {
        key: read_index(source.prefix).sequence_lengths for key, source in zip(new.keys, new.order.sources, strict=True)
    }
    rest = Segment(order=new.order, keys=new.keys, first_sample=0, last_sample=last)
    changes, is_exact = count_change(review.history, rest, num_consumed=first, lengths=lengths)
    # count_change says whether it counted every sample or estimated.
    about = "" if is_exact else "about "
    consumed = sum(change.consumed_tokens for change in changes)
    held = sum(source.epoch_tokens for source in new.order.sources)
    again, skipped, unseen = (
        sum(getattr(change, name) for change in changes) for name in ("again_tokens", "skipped_tokens", "unseen_tokens")
    )
    length = new.order.seq_length
    sentences = [
        f"Of the {num_consumed:,} samples ({consumed:,} tokens) trained on so far, {about}{again / length:,.0f} "
        f"({again:,} tokens, {again / max(consumed, 1):.1%}) would come again before their turn; of the rest, "
        f"{about}{skipped / length:,.0f} ({skipped:,} tokens, {skipped / held:.1%} of the training data) would be "
        f"skipped, {unseen:,} tokens of them never seen."
    ]
    if len(changes) > 1:
        sentences.append(f"By source: {'; '.join(_describe_source_change(change) for change in changes)}.")
    return sentences


def _describe_source_change(change: SourceChange) -> str:
    return (
        f"{change.prefix} {change.again_tokens:,} tokens of {change.consumed_tokens:,} again, "
        f"{change.skipped_tokens:,} skipped, {change.unseen_tokens:,} never seen"
    )


def find_keeping_flags(plan: RunPlan, review: OrderReview) -> str | None:
    """The flags of ours that would keep the checkpoint's order in this run, if there are any."""
    old = review.old
    if old.rows is not None or review.new.order.rows is not None:
        return None  # the order of conversations has none
    built_for = old.joint_samples if old.order == EPOCHWISE else old.num_samples
    for data_order, samples in ((MEGATRON, built_for), (EPOCHWISE, None), (EPOCHWISE, built_for)):
        # Megatron's order has an end, and this one would end before the run does.
        if data_order == MEGATRON and (samples or 0) < review.new.last_sample:
            continue
        settings = dataclasses.replace(plan.order, order=data_order, order_samples=samples)
        order = plan_run_order(settings, last_sample=review.new.last_sample, is_identified=True)
        assert order is not None
        keys = match_sources(order, order)[1]
        kept = Segment(order=order, keys=keys, first_sample=0, last_sample=review.new.last_sample)
        if review.new.last_sample <= order.num_available and is_continued(review.history[-1], kept):
            words = [] if data_order == MEGATRON == plan.data.order else [f"--data-order {data_order}"]
            words += [] if samples is None else [f"--data-order-samples {samples}"]
            return " ".join(words)
    return None
