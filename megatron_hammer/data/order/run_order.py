"""The order of a run's samples, from its data sets and the settings that shape it.

The settings are plain values, so that those of a run and those that a checkpoint was saved with are treated alike.
`order.py` has the arithmetic, `review.py` compares a run with the checkpoint that it resumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hammer.data.indexed.pair import IndexSummary, read_index
from megatron_hammer.data.order.identity import count_source, identify_source
from megatron_hammer.data.order.order import EPOCHWISE, DataOrder, TrainingSource, plan_order
from megatron_hammer.data.sources import SPLIT_NAMES, DataPlan, DataSource, count_split_tokens
from megatron_hammer.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderSettings:
    """What decides the order of a run's samples.

    sources: without any where the data flags make no sense. num_samples: that the run draws from each split. split: as
    it was typed. order_samples: --data-order-samples. rows: how conversations become samples; None for text.
    """

    sources: DataPlan
    num_samples: Mapping[str, int]
    split: str | None
    order: str
    order_samples: int | None
    seed: int
    seq_length: int
    surplus: float
    dataloader_type: str
    rows: str | None = None


def plan_run_order(
    settings: OrderSettings, *, split: str = "train", last_sample: int = 0, is_identified: bool = False
) -> DataOrder | None:
    """The order of the samples of `split`; None where the run draws none of them, or from files that cannot be read.

    last_sample: where in its order a resumed run ends. is_identified: read as much of the files as tells them
    from others.
    """
    sources = settings.sources.sources_of(split)
    if not sources or settings.num_samples[split] < 1:
        return None
    try:
        indices = [read_index(source.prefix) for source in sources]
    except (DataError, OSError):
        return None
    return _plan_order(settings, indices, split=split, last_sample=last_sample, is_identified=is_identified)


def plan_saved_order(saved: OrderSettings, new: DataOrder) -> DataOrder | None:
    """The training order by a checkpoint's settings alone; the new source in its place stands for one that is gone.

    None where the settings name no data, or where sources are gone and their number has changed.
    """
    sources = saved.sources.sources_of("train")
    if not sources or saved.num_samples["train"] < 1:
        return None
    indices = []
    for place, source in enumerate(sources):
        try:
            indices.append(read_index(source.prefix))
        except (DataError, OSError):
            if len(sources) != len(new.sources):
                return None
            indices.append(read_index(new.sources[place].prefix))
    return _plan_order(saved, indices)


def _plan_order(
    settings: OrderSettings,
    indices: Sequence[IndexSummary],
    *,
    split: str = "train",
    last_sample: int = 0,
    is_identified: bool = False,
) -> DataOrder:
    sources, is_own = settings.sources.sources_of(split), settings.sources.own is not None
    is_blend = settings.sources.is_blend(split)
    bounds = (0.0, 1.0) if is_own else read_bounds(settings.split, split)
    num_samples = settings.num_samples[split]
    return plan_order(
        [
            _describe_source(source, index, bounds, is_weighted=is_blend, is_identified=is_identified)
            for source, index in zip(sources, indices, strict=True)
        ],
        order=settings.order,
        seed=settings.seed,
        seq_length=settings.seq_length,
        num_samples=max(num_samples, last_sample) if settings.order == EPOCHWISE or split == "valid" else num_samples,
        order_samples=settings.order_samples if split == "train" else None,
        split=None if is_own else settings.split,
        surplus=settings.surplus,
        is_blend=is_blend,
        dataloader_type=settings.dataloader_type,
        rows=settings.rows,
    )


def _describe_source(
    source: DataSource, index: IndexSummary, bounds: tuple[float, float], *, is_weighted: bool, is_identified: bool
) -> TrainingSource:
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    return TrainingSource(
        prefix=source.prefix,
        weight=source.weight if is_weighted else None,
        first_sequence=first,
        last_sequence=last,
        epoch_tokens=count_split_tokens(index, bounds),
        identity=identify_source(source.prefix, index) if is_identified else count_source(index),
    )


def read_bounds(shares: str | None, split: str) -> tuple[float, float]:
    """Where a split begins and ends in each source, as shares; the bits are those that megatron-core computes."""
    # Imported here: megatron loads torch, and the rest of this file is used where neither is needed.
    from megatron.core.datasets import blended_megatron_dataset_config as config

    matrix: list[tuple[float, float]] = config.convert_split_vector_to_split_matrix(
        config.parse_and_normalize_split(shares)
    )
    return matrix[SPLIT_NAMES.index(split)]
