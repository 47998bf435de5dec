"""Whether a run that resumes goes on in the order of samples that its checkpoint was trained in.

Megatron skips as many samples as were consumed, of whatever order the present flags make. Here the two orders are
compared by what they draw, not by their flags; where they differ, the tokens that come again or are never seen are
counted, and the run stops unless --accept-data-order-change is given.
"""

import argparse
from collections.abc import Iterator

from megatron_hammer.config.data_order import OTHER_VALIDATION, OrderReview, plan_run_order, review_order
from megatron_hammer.config.samples import count_needed_samples
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.order.change import Segment, SourceChange, count_change, is_continued, match_sources
from megatron_hammer.data.order.identity import is_same_data
from megatron_hammer.data.order.order import EPOCHWISE, MEGATRON, DataOrder, SourceOrder

COUNTABLE_LOADER = "single"  # the others shuffle again, or are not Megatron's
ACCEPT = "pass --accept-data-order-change to go on in the new order"


def find_data_order_problems(namespace: argparse.Namespace) -> list[str]:
    """What would reorder the samples of a resumed run, or leave it without; one process a node looks."""
    if namespace.local_rank != 0:
        return []
    order = plan_run_order(namespace)
    if order is None:
        return []
    problems = list(_find_pin_problems(namespace, order))
    review = review_order(namespace) if not problems else None
    if review is None or is_uncountable(namespace):
        return problems
    problems += _find_shortage(review)
    if not review.is_same and review.history and not namespace.accept_data_order_change:
        problems.append(_describe_change(namespace, review))
    return problems


def is_uncountable(namespace: argparse.Namespace) -> bool:
    """Whether samples come in another order than the data set's."""
    return (namespace.dataloader_type or COUNTABLE_LOADER) != COUNTABLE_LOADER or bool(
        getattr(namespace, "phase_transition_iterations", None)
    )


def describe_order_state(namespace: argparse.Namespace) -> str | None:
    """The report's words for the order of samples; None without data."""
    order = plan_run_order(namespace)
    if order is None:
        return None
    built_for = "" if namespace.data_order_samples is None else f", built for {namespace.data_order_samples:,} samples"
    words = order.order + built_for
    review = review_order(namespace)
    if review is None:
        return words
    name = review.saved.directory.name
    if is_uncountable(namespace):
        return f"{words}; not compared with {name} (--dataloader-type or --phase-transition-iterations)"
    if not review.history:
        return f"{words}; not compared with {name}, whose arguments do not tell its data"
    if not review.is_same:
        accepted = ", accepted" if namespace.accept_data_order_change else ""
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


def _find_pin_problems(namespace: argparse.Namespace, order: DataOrder) -> Iterator[str]:
    pinned, needed = namespace.data_order_samples, count_needed_samples(namespace)["train"]
    if pinned is None:
        return
    if pinned < 1 or (namespace.data_order == MEGATRON and pinned < needed):
        yield (
            f"data-order-samples: must be at least the {needed} samples that the run draws, got "
            f"data_order_samples={pinned}. Pass {needed} or more, or --data-order epochwise, which goes on after them."
        )
    shares = {(source.prefix, source.weight) for source in order.sources}
    if namespace.data_order == EPOCHWISE and len({prefix for prefix, _ in shares}) < len(shares):
        yield (
            "data-order-samples: needs every prefix once, got one with several weights. Add the weights up in "
            "--data-path."
        )


def _find_shortage(review: OrderReview) -> list[str]:
    """Megatron stops in the middle where the samples end, as after a change of the batch."""
    order, last = review.new.order, review.new.last_sample
    if last <= order.num_available or last <= review.saved.num_consumed:
        return []
    return [
        f"data-order: must hold all samples of the run, got {order.num_available} samples, {last} needed (the "
        f"checkpoint has drawn {review.saved.num_consumed}, and --global-batch-size counts from there). Pass "
        f"--data-order-samples {last}, or --data-order epochwise, which has no end."
    ]


# --- a changed order ------------------------------------------------------------------------------------------------


def _describe_change(namespace: argparse.Namespace, review: OrderReview) -> str:
    """One problem of a few sentences: what changed, what comes again and is skipped, by source, and what to do."""
    changes = "; ".join(list_order_changes(review.old, review.new.order)) or "another order of samples"
    sentences = [
        f"data-order: must be that of the checkpoint, got {changes} (in {review.saved.directory}).",
        *_describe_counts(review),
    ]
    if not review.is_recorded:
        sentences.append("The checkpoint does not tell its files, so their contents could not be compared.")
    remedy = find_keeping_flags(namespace, review)
    keep = f"Pass {remedy}, which keeps the order" if remedy else "Change it back"
    return " ".join([*sentences, f"{keep}, or {ACCEPT}."])


def list_order_changes(old: DataOrder, new: DataOrder) -> list[str]:
    """What shapes the order and differs, each with its new and its old value."""
    pairs = [(name, getattr(new, name), getattr(old, name)) for name in ("seed", "seq_length", "dataloader_type")]
    if old.split != new.split and [_bounds(source) for source in old.sources] != [
        _bounds(source) for source in new.sources
    ]:
        pairs.append(("split", new.split, old.split))
    changes = [f"{name}={now} (was {before})" for name, now, before in pairs if now != before]
    source_changes, has_other_epochs = _list_source_changes(old, new)
    if has_other_epochs:
        causes = ("order", "num_samples", "joint_samples", "surplus")
        names = {"order": "data_order", "num_samples": "samples", "joint_samples": "data_order_samples"}
        changes += [
            f"{names.get(name, name)}={getattr(new, name)} (was {getattr(old, name)})"
            for name in causes
            if getattr(new, name) != getattr(old, name)
        ]
    return changes + source_changes


def _bounds(source: SourceOrder) -> tuple[int, int]:
    return source.first_sequence, source.last_sequence


def _list_source_changes(old: DataOrder, new: DataOrder) -> tuple[list[str], bool]:
    """Changes source by source, and whether another number of epochs is shuffled together in one of them."""
    old_keys, new_keys = match_sources(old, new)
    shares = [_shares(order) for order in (old, new)]
    changes, has_other_epochs = [], False
    for place, (key, source) in enumerate(zip(new_keys, new.sources, strict=True)):
        if key not in old_keys:
            namesake = next((other for other in old.sources if other.prefix == source.prefix), None)
            changes.append(f"{source.prefix} {_describe_contents(source, namesake)}")
            continue
        before = old.sources[old_keys.index(key)]
        if shares[0][old_keys.index(key)] != shares[1][place]:
            old_share, new_share = shares[0][old_keys.index(key)], shares[1][place]
            changes.append(f"{source.prefix} with weight {new_share:.6g} (was {old_share:.6g})")
        if _joint_epochs(before) != _joint_epochs(source):
            has_other_epochs = True
            changes.append(f"{source.prefix} with {describe_epochs(source)} (was {describe_epochs(before)})")
    gone = [source.prefix for key, source in zip(old_keys, old.sources, strict=True) if key not in new_keys]
    new_prefixes = {source.prefix for source in new.sources}
    changes += [f"no {prefix}" for prefix in gone if prefix not in new_prefixes]
    if sorted(old_keys) == sorted(new_keys) and old_keys != new_keys:
        row, old_row = (", ".join(source.prefix for source in order.sources) for order in (new, old))
        changes.append(f"sources in the row {row} (was {old_row})")
    return changes, has_other_epochs


def _shares(order: DataOrder) -> list[float]:
    return order.blend_weights if order.is_blend else [1.0]


def _describe_contents(source: SourceOrder, before: SourceOrder | None) -> str:
    if before is None:
        return "as a new source"
    now, then = source.identity, before.identity
    for name in ("num_documents", "num_sequences", "num_tokens"):
        if getattr(now, name) != getattr(then, name):
            return f"with other contents: {name}={getattr(now, name)} (was {getattr(then, name)})"
    assert is_same_data(now, then) is False
    return "with other contents: as many documents and tokens, but not the same"


def _joint_epochs(source: SourceOrder) -> tuple[int, bool]:
    return source.epochs.num_joint_epochs, source.epochs.is_last_apart


def describe_epochs(source: SourceOrder) -> str:
    """3 epochs shuffled together, the last apart"""
    num_epochs, num_joint = source.epochs.num_epochs, source.epochs.num_joint_epochs
    if num_joint == 1:
        return "one epoch" if num_epochs == 1 else f"each of {num_epochs} epochs shuffled by itself"
    apart = ", the last apart" if source.epochs.is_last_apart else ""
    later = f", then {num_epochs - num_joint} by themselves" if num_epochs > num_joint else ""
    return f"{num_joint} epochs shuffled together{apart}{later}"


def _describe_counts(review: OrderReview) -> list[str]:
    """How much comes again and is skipped, over all and by source."""
    saved, new = review.saved, review.new
    if review.old.dataloader_type != COUNTABLE_LOADER:
        return [f"What comes again under --dataloader-type {review.old.dataloader_type} cannot be counted."]
    last = min(max(new.last_sample, saved.num_consumed), new.order.num_available)
    first = min(saved.num_consumed, last)
    lengths = {
        key: read_index(source.prefix).sequence_lengths for key, source in zip(new.keys, new.order.sources, strict=True)
    }
    rest = Segment(order=new.order, keys=new.keys, first_sample=0, last_sample=last)
    changes, is_exact = count_change(review.history, rest, num_consumed=first, lengths=lengths)
    about = "" if is_exact else "about "
    consumed = sum(change.consumed_tokens for change in changes)
    held = sum(source.epoch_tokens for source in new.order.sources)
    again, skipped, unseen = (
        sum(getattr(change, name) for change in changes) for name in ("again_tokens", "skipped_tokens", "unseen_tokens")
    )
    length = new.order.seq_length
    sentences = [
        f"Of the {saved.num_consumed:,} samples ({consumed:,} tokens) trained on so far, {about}{again / length:,.0f} "
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


def find_keeping_flags(namespace: argparse.Namespace, review: OrderReview) -> str | None:
    """The flags of ours that would keep the checkpoint's order in this run, if there are any."""
    old = review.old
    built_for = old.joint_samples if old.order == EPOCHWISE else old.num_samples
    for data_order, samples in ((MEGATRON, built_for), (EPOCHWISE, None), (EPOCHWISE, built_for)):
        if data_order == MEGATRON and (samples or 0) < review.new.last_sample:
            continue
        order = plan_run_order(
            namespace,
            last_sample=review.new.last_sample,
            is_identified=True,
            data_order=data_order,
            data_order_samples=samples,
        )
        assert order is not None
        keys = match_sources(order, order)[1]
        kept = Segment(order=order, keys=keys, first_sample=0, last_sample=review.new.last_sample)
        if review.new.last_sample <= order.num_available and is_continued(review.history[-1], kept):
            words = (
                [] if data_order == MEGATRON and namespace.data_order == MEGATRON else [f"--data-order {data_order}"]
            )
            words += [] if samples is None else [f"--data-order-samples {samples}"]
            return " ".join(words)
    return None
