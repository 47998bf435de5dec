"""In which order Megatron draws training samples, as arithmetic on numpy arrays: no data set is opened, nothing cached.

A source (.bin/.idx prefix, cut to the split's sequences) is read in epochs. Megatron lays the documents of `num_epochs`
epochs one after another, shuffles them together, cuts the stream every seq_length tokens into samples, and shuffles the
samples. How many epochs that are follows from the number of samples asked for, so a longer run is another order.
The order of `--data-order epochwise` begins with such a block, one epoch by default, and shuffles each later epoch by
itself, so that a longer run is the same order, continued.
Source: megatron/core/datasets/{gpt_dataset,blended_dataset,blended_megatron_dataset_builder}.py; equality with them,
element by element, is pinned by tests/unit/data/order/test_order.py. Next: change.py counts what a change repeats.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_hammer.files.typed import validate

MEGATRON, EPOCHWISE = "megatron", "epochwise"
FINAL_EPOCH_SHARE = 0.80  # Megatron's threshold: with less of it drawn, the last epoch is shuffled apart


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPlan:
    """How a source is read. The first `num_joint_epochs` are shuffled together as Megatron does, later ones each alone.

    is_last_apart: of the joint epochs, the last is kept out of the shuffle (Megatron's separate_final_epoch).
    """

    num_epochs: int
    num_joint_epochs: int
    is_last_apart: bool


def count_samples(num_epochs: int, epoch_tokens: int, seq_length: int) -> int:
    """Samples in so many epochs; each needs one token more than it trains on, as the last label."""
    return (num_epochs * epoch_tokens - 1) // seq_length


def plan_epochs(
    num_samples: int | None,
    epoch_tokens: int,
    seq_length: int,
    *,
    order: str = MEGATRON,
    joint_samples: int | None = None,
) -> EpochPlan:
    """Epochs of a source from which `num_samples` are drawn; None is one epoch.

    joint_samples: under the epochwise order, the number that Megatron's first block is built for; None is one epoch.
    """
    if order == EPOCHWISE:
        joint = plan_epochs(joint_samples, epoch_tokens, seq_length)
        whole = plan_epochs(num_samples, epoch_tokens, seq_length)
        return dataclasses.replace(joint, num_epochs=max(joint.num_epochs, whole.num_epochs))
    if num_samples is None:
        return EpochPlan(num_epochs=1, num_joint_epochs=1, is_last_apart=False)
    # GPTDataset._get_num_epochs: one token more than the samples, for the label of the last.
    num_epochs = max(1, -(-(num_samples * seq_length + 1) // epoch_tokens))
    from_last_epoch = num_samples - count_samples(num_epochs - 1, epoch_tokens, seq_length)
    an_epoch = count_samples(1, epoch_tokens, seq_length)
    # int() as in GPTDataset: the threshold is rounded down.
    is_last_apart = num_epochs > 1 and from_last_epoch < int(FINAL_EPOCH_SHARE * an_epoch)
    return EpochPlan(num_epochs=num_epochs, num_joint_epochs=num_epochs, is_last_apart=is_last_apart)


def build_document_order(documents: np.ndarray, plan: EpochPlan, *, seed: int, generator: np.random.RandomState) -> Any:
    """The documents of all epochs one after another: [num_epochs * len(documents)] int32.

    generator: of the joint epochs; `build_sample_order` draws from it next, as in Megatron.
    """
    num_apart = 1 if plan.is_last_apart else 0
    # GPTDataset._build_document_index: all joint epochs in one shuffle, or the last one in a shuffle of its own.
    blocks = [np.tile(documents.astype(np.int32), plan.num_joint_epochs - num_apart)]
    blocks += [documents.astype(np.int32)] * num_apart
    blocks = [block.copy() for block in blocks]
    for block in blocks:
        generator.shuffle(block)
    for epoch in range(plan.num_joint_epochs, plan.num_epochs):
        blocks.append(documents.astype(np.int32))
        _document_generator(seed, epoch).shuffle(blocks[-1])
    return np.concatenate(blocks)


def build_sample_order(
    plan: EpochPlan, epoch_tokens: int, seq_length: int, *, seed: int, generator: np.random.RandomState
) -> np.ndarray:
    """Which sample of the stream is drawn first, second, ...: a permutation within each block of epochs.

    An epoch's samples are those that end in it. The first of a later epoch begins in the one before; it stays first, so
    that no token comes again before all of its epoch have come.
    """

    def count(num_epochs: int) -> int:
        return count_samples(num_epochs, epoch_tokens, seq_length)

    dtype = np.uint32 if count(plan.num_epochs) < np.iinfo(np.uint32).max - 1 else np.int64
    joint = plan.num_joint_epochs
    bounds = [0, count(joint - 1), count(joint)] if plan.is_last_apart else [0, count(joint)]
    blocks = [np.arange(first, last, dtype=dtype) for first, last in itertools.pairwise(bounds)]
    for block in blocks:
        generator.shuffle(block)
    for epoch in range(joint, plan.num_epochs):
        blocks.append(np.arange(count(epoch), count(epoch + 1), dtype=dtype))
        # A view: shuffling it leaves the first sample of the epoch in place.
        _sample_generator(seed, epoch).shuffle(blocks[-1][1:])
    return np.concatenate(blocks)


def build_source_order(
    documents: np.ndarray, plan: EpochPlan, epoch_tokens: int, seq_length: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(document order, sample order) of a source; see the two functions above."""
    generator = np.random.RandomState(seed)
    document_order = build_document_order(documents, plan, seed=seed, generator=generator)
    return document_order, build_sample_order(plan, epoch_tokens, seq_length, seed=seed, generator=generator)


# RandomState and not default_rng: numpy promises that its streams never change.
def _document_generator(seed: int, epoch: int) -> np.random.RandomState:
    return np.random.RandomState([seed, epoch, 0])


def _sample_generator(seed: int, epoch: int) -> np.random.RandomState:
    return np.random.RandomState([seed, epoch, 1])


# --- blends ---------------------------------------------------------------------------------------------------------


def normalize_weights(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weights as shares of one: float64 [n], rounded as megatron.core.datasets.utils.normalize rounds them."""
    values = np.array(weights, dtype=np.float64)
    return values / np.sum(values)


def share_samples(num_samples: int, weights: Sequence[float] | np.ndarray, *, surplus: float = 0.0) -> list[int]:
    """Samples asked of each source of a blend; `weights` as shares of one.

    Source: blended_megatron_dataset_builder._get_size_per_split_per_dataset.
    """
    # Two roundings, as in Megatron: first the share, then the surplus on it.
    return [math.ceil(math.ceil(num_samples * weight) * (1 + surplus)) for weight in weights]


def list_requested_samples(
    num_samples: int, num_sources: int, weights: Sequence[float] | None, *, is_blend: bool, surplus: float
) -> list[int | None]:
    """Samples asked of each source, weights as given; None where it is read once: in a blend without weights."""
    if not is_blend:
        return [num_samples]
    if weights is None:
        return [None] * num_sources
    return list(share_samples(num_samples, normalize_weights(weights), surplus=surplus))


def build_blend(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, sample index within the source) of each of `size` samples: int16 and int64.

    weights: as shares of one. The choice is greedy, so a longer blend begins with the same samples.
    """
    from megatron.core.datasets import helpers

    sources, samples = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(sources, samples, list(weights), len(weights), size, False)
    return sources, samples


# --- the order of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIdentity:
    """What a pair holds. fingerprint: see identity.py; the hashes are from its manifest. None: not known."""

    num_sequences: int
    num_documents: int
    num_tokens: int
    fingerprint: str | None = None
    bin_sha256: str | None = None
    idx_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSource:
    """A source as a run names it. weight: as given. Sequences [first_sequence, last_sequence) are for training.

    epoch_tokens: tokens of those sequences.
    """

    prefix: str
    weight: float | None
    identity: SourceIdentity
    first_sequence: int
    last_sequence: int
    epoch_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOrder(TrainingSource):
    """A source with the order of its samples. num_requested: samples asked of it, None for one epoch.

    num_joint: the same for the first block of the epochwise order.
    """

    num_requested: int | None
    num_joint: int | None
    epochs: EpochPlan

    def count_samples(self, seq_length: int) -> int:
        return count_samples(self.epochs.num_epochs, self.epoch_tokens, seq_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOrder:
    """All that shapes the order of training samples.

    num_samples: that it is built for. joint_samples: --data-order-samples under the epochwise order. split: its text.
    rows: how conversations become samples (data/conversations/packing.py), which shuffles every epoch by itself and has
    no end; None for text, whose samples are cut as this file says.
    """

    order: str
    seed: int
    seq_length: int
    num_samples: int
    joint_samples: int | None
    split: str | None
    surplus: float
    is_blend: bool
    dataloader_type: str
    sources: tuple[SourceOrder, ...]
    rows: str | None = None

    @property
    def blend_weights(self) -> list[float]:
        """Shares of one, as BlendedDataset hands them to the blending helper."""
        if self.sources[0].weight is None:
            return normalize_weights([source.count_samples(self.seq_length) for source in self.sources]).tolist()
        # Twice, as in Megatron: the builder divides the weights by their sum, and BlendedDataset does so again.
        return normalize_weights(normalize_weights([source.weight or 0.0 for source in self.sources])).tolist()

    @property
    def num_available(self) -> int:
        """Samples that the order holds. Of conversations, preflight counts what a blend without weights holds."""
        if self.rows is not None:
            return sys.maxsize
        held = sum(source.count_samples(self.seq_length) for source in self.sources)
        if not self.is_blend:
            return held
        if self.sources[0].weight is None:
            return min(self.num_samples, held)
        weights = normalize_weights([source.weight or 0.0 for source in self.sources])
        return sum(share_samples(self.num_samples, weights))

    @property
    def joint_samples_of_sources(self) -> dict[str, int]:
        """By prefix, the samples that the first block of a source's epochs is built for; without it: one epoch."""
        return {source.prefix: source.num_joint for source in self.sources if source.num_joint is not None}

    def draw(self, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample index within the source) of the first samples."""
        if self.is_blend:
            return build_blend(self.blend_weights, num_samples)
        return np.zeros(num_samples, dtype=np.int16), np.arange(num_samples)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"sources": [dataclasses.asdict(source) for source in self.sources]}

    @classmethod
    def from_json(cls, fields: Any) -> "DataOrder":
        """Raises DataError where `fields` is not what `to_json` gave."""
        return validate(fields, cls, where="data order", remedy="It is not ours.", allows_unknown=False)


def plan_order(
    sources: Sequence[TrainingSource],
    *,
    order: str,
    seed: int,
    seq_length: int,
    num_samples: int,
    order_samples: int | None,
    split: str | None,
    surplus: float,
    is_blend: bool,
    dataloader_type: str,
    rows: str | None = None,
) -> DataOrder:
    """The order of a run that draws `num_samples`, as the dataset builder would make it.

    order_samples: --data-order-samples, the number that Megatron's order, or the epochwise order's first block, is
    built for.
    """
    if order == MEGATRON and order_samples is not None:
        num_samples = order_samples
    joint_samples = order_samples if order == EPOCHWISE else None
    weights = None if sources[0].weight is None else [source.weight or 0.0 for source in sources]

    def requested(count: int | None) -> Sequence[int | None]:
        if count is None:
            return [None] * len(sources)
        return list_requested_samples(count, len(sources), weights, is_blend=is_blend, surplus=surplus)

    planned = [
        SourceOrder(
            **{field.name: getattr(source, field.name) for field in dataclasses.fields(source)},
            num_requested=num_requested,
            num_joint=num_joint,
            epochs=EpochPlan(num_epochs=1, num_joint_epochs=1, is_last_apart=False)
            if rows is not None
            else plan_epochs(num_requested, source.epoch_tokens, seq_length, order=order, joint_samples=num_joint),
        )
        for source, num_requested, num_joint in zip(
            sources, requested(num_samples), requested(joint_samples), strict=True
        )
    ]
    return DataOrder(
        order=order,
        seed=seed,
        seq_length=seq_length,
        num_samples=num_samples,
        joint_samples=joint_samples,
        split=split,
        surplus=surplus,
        is_blend=is_blend,
        dataloader_type=dataloader_type,
        sources=tuple(planned),
        rows=rows,
    )
