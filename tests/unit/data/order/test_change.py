"""Counting a changed order: against samples of real data sets in tests/unit/config/preflight/test_data_order.py."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hammer.data.order import change as order_change
from megatron_hammer.data.order.change import Segment, count_change, find_spans, is_continued, match_sources
from megatron_hammer.data.order.order import (
    MEGATRON,
    DataOrder,
    SourceIdentity,
    TrainingSource,
    build_source_order,
    plan_order,
)

LENGTHS = np.random.default_rng(3).integers(0, 90, 6000)
TOTAL = int(LENGTHS.sum())
SEQ_LENGTH = 64


def source(name: str = "a", *, weight: float | None = None, fingerprint: str | None = None) -> TrainingSource:
    return TrainingSource(
        prefix=name,
        weight=weight,
        first_sequence=0,
        last_sequence=len(LENGTHS),
        epoch_tokens=TOTAL,
        identity=SourceIdentity(
            num_sequences=len(LENGTHS), num_documents=len(LENGTHS), num_tokens=TOTAL, fingerprint=fingerprint
        ),
    )


def plan(num_samples: int, *sources: TrainingSource, seed: int = 1, order: str = MEGATRON) -> DataOrder:
    sources = sources or (source(),)
    return plan_order(
        sources,
        order=order,
        seed=seed,
        seq_length=SEQ_LENGTH,
        num_samples=num_samples,
        order_samples=None,
        split="1",
        surplus=0.005,
        is_blend=sources[0].weight is not None or len(sources) > 1,
        dataloader_type="single",
    )


def segment(order: DataOrder, last_sample: int, *, first_sample: int = 0) -> Segment:
    keys = match_sources(order, order)[1]
    return Segment(order=order, keys=keys, first_sample=first_sample, last_sample=last_sample)


@pytest.mark.parametrize("num_samples", [500, 6000])
def test_spans_are_the_tokens_of_the_samples(num_samples: int) -> None:
    order = plan(num_samples)
    spans = find_spans(order.sources[0], order, LENGTHS, [(10, 310), (310, 400)])
    document_order, sample_order = build_source_order(
        np.arange(len(LENGTHS), dtype=np.int32), order.sources[0].epochs, TOTAL, SEQ_LENGTH, seed=1
    )
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    stream = np.concatenate([np.arange(starts[document], starts[document + 1]) for document in document_order])
    for (first, last), (span_starts, span_ends) in zip([(10, 310), (310, 400)], spans, strict=True):
        drawn = np.concatenate([stream[i * SEQ_LENGTH : (i + 1) * SEQ_LENGTH] for i in sample_order[first:last]])
        found = np.concatenate([np.arange(*span) for span in zip(span_starts, span_ends, strict=True)])
        assert np.array_equal(np.sort(found), np.sort(drawn))


def test_the_same_order_repeats_nothing() -> None:
    order = plan(3000)
    (change,), is_exact = count_change(
        [segment(order, 1000)], segment(order, 3000), num_consumed=1000, lengths={0: LENGTHS}
    )
    assert is_exact
    assert (change.consumed_tokens, change.again_tokens, change.skipped_tokens, change.unseen_tokens) == (
        64_000,
        0,
        0,
        0,
    )


def test_large_orders_are_estimated_from_every_kth_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed within one epoch: of a quarter consumed, three quarters lie in the rest that is drawn."""
    old, new = plan(4000, seed=1), plan(4000, seed=2)
    exact, is_exact = count_change([segment(old, 1000)], segment(new, 4000), num_consumed=1000, lengths={0: LENGTHS})
    assert is_exact
    monkeypatch.setattr(order_change, "MAX_EXACT_PIECES", 7000)
    about, is_exact = count_change([segment(old, 1000)], segment(new, 4000), num_consumed=1000, lengths={0: LENGTHS})
    assert not is_exact
    for name in ("again_tokens", "skipped_tokens", "unseen_tokens"):
        # 2 to 3 % measured: 1 of 3 documents stand for all
        assert getattr(about[0], name) == pytest.approx(getattr(exact[0], name), rel=0.06)
        assert getattr(about[0], name) != getattr(exact[0], name)
    assert exact[0].unseen_tokens == exact[0].skipped_tokens > 40_000


def test_sources_are_known_by_their_data() -> None:
    a, b, c = (source(name, weight=1, fingerprint=name) for name in "abc")
    moved = replace(a, prefix="elsewhere/a")
    old, new = plan(100, a, b), plan(100, b, moved, c)
    assert match_sources(old, new) == ((1, 0), (0, 1, 2))
    twice = plan(100, a, a)
    assert match_sources(twice, twice) == ((0, 0), (0, 0))
    rewritten = replace(a, identity=replace(a.identity, fingerprint="x"))
    assert match_sources(plan(100, a), plan(100, rewritten)) == ((1,), (0,))


def test_sources_named_in_another_order() -> None:
    """The same blend, unless two sources are due at once: then the first named comes first."""
    a, b = source("a", weight=0.618, fingerprint="a"), source("b", weight=0.382, fingerprint="b")

    def continues(first: DataOrder, second: DataOrder) -> bool:
        keys = match_sources(first, second)
        before = Segment(order=first, keys=keys[0], first_sample=0, last_sample=150)
        return is_continued(before, Segment(order=second, keys=keys[1], first_sample=0, last_sample=400))

    assert continues(plan(400, a, b), plan(400, b, a))
    assert not continues(plan(400, a, b), plan(400, replace(b, weight=0.39), replace(a, weight=0.61)))
    even = replace(a, weight=0.5), replace(b, weight=0.5)
    assert continues(plan(400, *even), plan(300, *even))
    assert not continues(plan(400, *even), plan(400, *even[::-1]))
