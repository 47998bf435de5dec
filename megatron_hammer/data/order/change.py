"""What a changed data order does to a run that continues in it: which tokens come again, and which are skipped.

A run that resumes skips as many samples of its order as it has trained on. In another order these are other samples: of
those that it trained on, some are still to come, and of those skipped, some were never trained on. Counted in tokens,
since another sequence length cuts other samples. A source is known by its data, not by its name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.data.order.identity import is_same_data
from megatron_hammer.data.order.order import DataOrder, SourceOrder, build_source_order

# Above so many documents and samples (of all epochs and orders) every k-th document stands for k.
MAX_EXACT_PIECES = 20_000_000
# A small source is not thinned out further: an estimate from fewer sequences would vary by more than a few per cent.
MIN_KEPT_SEQUENCES = 1000

Spans = tuple[np.ndarray, np.ndarray]  # starts and ends, in tokens from the beginning of the source


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Samples [first_sample, last_sample) of an order. keys: of its sources, from `match_sources`."""

    order: DataOrder
    keys: tuple[int, ...]
    first_sample: int
    last_sample: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceChange:
    """Tokens of one source. consumed: trained on so far. again: trained on, and still to come in the new order although
    that holds other tokens for consumed. skipped: the new order holds them for consumed, and they were not. unseen: of
    these, not even once by the end of the run.
    """

    prefix: str
    consumed_tokens: int
    again_tokens: int
    skipped_tokens: int
    unseen_tokens: int


def match_sources(old: DataOrder, new: DataOrder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers for the sources of both orders; two sources of one number hold the same data.

    Sources that were not identified match by prefix, or by place where both orders have as many.
    """
    new_keys: list[int] = []
    for position, source in enumerate(new.sources):
        same = [key for key, other in zip(new_keys, new.sources, strict=False) if _is_same(source, other)]
        new_keys.append(same[0] if same else position)
    old_keys: list[int] = []
    for position, source in enumerate(old.sources):
        same = [key for key, other in zip(new_keys, new.sources, strict=True) if _is_same(source, other)]
        if not same and len(old.sources) == len(new.sources):
            is_known = is_same_data(source.identity, new.sources[position].identity)
            same = [new_keys[position]] if is_known is None else []
        old_keys.append(same[0] if same else len(new.sources) + position)
    return tuple(old_keys), tuple(new_keys)


def _is_same(first: SourceOrder, second: SourceOrder) -> bool:
    is_same = is_same_data(first.identity, second.identity)
    return first.prefix == second.prefix if is_same is None else is_same


def is_continued(old: Segment, new: Segment) -> bool:
    """Whether both orders begin with the same samples, as far as `old.last_sample`; they may end before."""
    num_samples = old.last_sample
    signatures = [
        [
            _signature(segment.order, source, key)
            for source, key in zip(segment.order.sources, segment.keys, strict=True)
        ]
        for segment in (old, new)
    ]
    if signatures[0] == signatures[1] and (
        len(signatures[0]) == 1 or old.order.blend_weights == new.order.blend_weights
    ):
        return True
    # With no source in common, or too many samples to draw, the answer is no: the counts are shown then.
    if not set(signatures[0]) & set(signatures[1]) or num_samples > MAX_EXACT_PIECES or new.order.rows is not None:
        return False
    # Both orders are drawn, and the samples of equal sources get equal numbers, whatever their place in the blend.
    known = {signature: number for number, signature in enumerate(dict.fromkeys(signatures[0] + signatures[1]))}
    drawn = []
    for segment, of_sources in zip((old, new), signatures, strict=True):
        sources, samples = segment.order.draw(num_samples)
        drawn.append((np.array([known[signature] for signature in of_sources])[sources], samples))
    return np.array_equal(drawn[0][0], drawn[1][0]) and np.array_equal(drawn[0][1], drawn[1][1])


def _signature(order: DataOrder, source: SourceOrder, key: int) -> tuple[object, ...]:
    """What decides a source's own order as far as it goes."""
    epochs = source.epochs
    bounds = (source.first_sequence, source.last_sequence)
    return key, bounds, order.seed, order.seq_length, order.rows, epochs.num_joint_epochs, epochs.is_last_apart


def count_change(
    history: Sequence[Segment], new: Segment, *, num_consumed: int, lengths: Mapping[int, np.ndarray]
) -> tuple[tuple[SourceChange, ...], bool]:
    """What comes again and what is skipped, by source, and whether the numbers are exact.

    history: what was trained on. new: the order to continue in, from its first sample to the last of the run. lengths:
    of the sequences of each source, by key; a source that cannot be read any more has none, and only its consumed
    tokens are counted.
    """
    pieces = sum(_count_pieces(segment.order) for segment in (*history, new))
    # Rounded up, so that the number of pieces stays below the limit.
    step = max(1, -(-pieces // MAX_EXACT_PIECES))
    steps = {key: max(1, min(step, len(values) // MIN_KEPT_SEQUENCES)) for key, values in lengths.items()}
    spans: dict[int, list[list[Spans]]] = {key: [[], [], []] for key in lengths}
    consumed: dict[int, int] = {}
    names: dict[int, str] = {}
    for segment in history:
        for key, source, (bounds,) in _list_drawn(segment, (segment.first_sample, segment.last_sample)):
            names[key] = source.prefix
            consumed[key] = consumed.get(key, 0) + (bounds[1] - bounds[0]) * segment.order.seq_length
            if key in lengths:
                spans[key][0] += find_spans(source, segment.order, lengths[key], [bounds], steps[key])
    for key, source, ranges in _list_drawn(new, (0, num_consumed), (num_consumed, new.last_sample)):
        names[key] = source.prefix
        counted, rest = find_spans(source, new.order, lengths[key], ranges, steps[key])
        spans[key][1].append(counted)
        spans[key][2].append(rest)
    changes = []
    for key, prefix in names.items():
        again, skipped, unseen = (
            (round(tokens * _scale_of(lengths[key], steps[key])) for tokens in _compare_spans(spans[key]))
            if key in lengths
            else (0, 0, 0)
        )
        changes.append(
            SourceChange(
                prefix=prefix,
                consumed_tokens=consumed.get(key, 0),
                again_tokens=again,
                skipped_tokens=skipped,
                unseen_tokens=unseen,
            )
        )
    return tuple(changes), all(step == 1 for step in steps.values()) and new.last_sample <= MAX_EXACT_PIECES


def _count_pieces(order: DataOrder) -> int:
    return sum(
        source.epochs.num_epochs * (source.last_sequence - source.first_sequence)
        + source.count_samples(order.seq_length)
        for source in order.sources
    )


def _list_drawn(segment: Segment, *ranges: tuple[int, int]) -> list[tuple[int, SourceOrder, list[tuple[int, int]]]]:
    """(key, source, ranges of the source's own samples) that these ranges of the order's samples draw."""
    counts = {position: _count_drawn(segment.order, position) for bounds in ranges for position in bounds}
    return [
        (key, source, [(int(counts[first][place]), int(counts[last][place])) for first, last in ranges])
        for place, (key, source) in enumerate(zip(segment.keys, segment.order.sources, strict=True))
    ]


def _count_drawn(order: DataOrder, num_samples: int) -> np.ndarray:
    if not order.is_blend:
        return np.array([num_samples])
    if num_samples > MAX_EXACT_PIECES:
        return np.round(np.array(order.blend_weights) * num_samples).astype(np.int64)
    return np.bincount(order.draw(num_samples)[0], minlength=len(order.sources))


def _scale_of(lengths: np.ndarray, step: int) -> float:
    return 1.0 if step == 1 else float(np.sum(lengths, dtype=np.int64) / np.sum(lengths[::step], dtype=np.int64))


def find_spans(
    source: SourceOrder, order: DataOrder, lengths: np.ndarray, ranges: Sequence[tuple[int, int]], step: int = 1
) -> list[Spans]:
    """The tokens of the source's samples [first, last) of each range, cut at the documents.

    step: take every so many sequences for the whole source, and as large a share of its samples.
    """
    kept = np.asarray(lengths[::step], dtype=np.int64)
    documents = np.arange(-(-source.first_sequence // step), -(-source.last_sequence // step), dtype=np.int32)
    epoch_tokens = int(kept[documents].sum())
    num_samples = source.count_samples(order.seq_length)
    # With every k-th document, an epoch has about 1/k of the samples.
    scaled = dataclasses.replace(source, epoch_tokens=epoch_tokens)
    share = scaled.count_samples(order.seq_length) / num_samples if step > 1 else 1
    document_order, sample_order = build_source_order(
        documents, source.epochs, epoch_tokens, order.seq_length, seed=order.seed
    )
    ends = np.cumsum(kept[document_order])
    # Positions in the order's stream of tokens; `starts_in_source` leads back to positions in the source.
    stream = np.concatenate([[0], ends])
    starts_in_source = np.concatenate([[0], np.cumsum(kept)])[document_order] - stream[:-1]
    found = []
    for first, last in ranges:
        samples = np.sort(sample_order[round(first * share) : round(last * share)].astype(np.int64))
        found.append(_cut_at_documents(samples, order.seq_length, stream, starts_in_source))
    return found


def _cut_at_documents(samples: np.ndarray, seq_length: int, stream: np.ndarray, starts_in_source: np.ndarray) -> Spans:
    """samples: sorted. stream: where each document of the order begins, and the end. Returns spans in the source."""
    if len(samples) == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    # Neighbouring samples are one run of tokens: fewer spans to compare.
    is_first = np.concatenate([[True], np.diff(samples) > 1])
    starts = samples[is_first] * seq_length
    ends = (samples[np.concatenate([is_first[1:], [True]])] + 1) * seq_length
    first_slots = np.searchsorted(stream, starts, side="right") - 1
    last_slots = np.searchsorted(stream, ends, side="left") - 1
    counts = last_slots - first_slots + 1
    runs = np.repeat(np.arange(len(starts)), counts)
    slots = first_slots[runs] + np.arange(len(runs)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces_start = np.maximum(starts[runs], stream[slots]) + starts_in_source[slots]
    pieces_end = np.minimum(ends[runs], stream[slots + 1]) + starts_in_source[slots]
    return pieces_start, pieces_end


def _compare_spans(spans: Sequence[Sequence[Spans]]) -> tuple[int, int, int]:
    """(again, skipped, unseen) tokens, from what was trained on, what the new order counts as such, and its rest."""
    positions: list[np.ndarray] = []
    kinds: list[np.ndarray] = []
    steps: list[np.ndarray] = []
    for kind, of_kind in enumerate(spans):
        for starts, ends in of_kind:
            positions += [starts, ends]
            kinds.append(np.full(2 * len(starts), kind, dtype=np.int8))
            steps += [np.ones(len(starts), dtype=np.int8), np.full(len(ends), -1, dtype=np.int8)]
    position = np.concatenate(positions)
    in_order = np.argsort(position, kind="stable")
    kind_of, step_of = np.concatenate(kinds)[in_order], np.concatenate(steps)[in_order]
    # A sweep over the source: between two neighbouring bounds the three counts do not change.
    widths = np.diff(position[in_order])
    trained, counted, rest = (np.cumsum(np.where(kind_of == number, step_of, 0))[:-1] for number in range(3))
    # Counted with multiplicity: tokens of a source that is read in several epochs are trained on several times.
    again = np.minimum(rest, np.maximum(0, trained - counted))
    skipped = np.maximum(0, counted - trained)
    unseen = (counted > 0) & (trained == 0) & (rest == 0)
    return int(np.sum(again * widths)), int(np.sum(skipped * widths)), int(np.sum(widths[unseen]))
