"""The dataset configuration of a run, from Megatron's namespace."""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from megatron_hammer.config.data_order import (
    RECORD_NAME,
    build_record,
    count_last_sample,
    count_last_validation_sample,
    plan_run_order,
)
from megatron_hammer.data.order.order import EPOCHWISE, MEGATRON


def build_dataset_provider(namespace: argparse.Namespace) -> Any:
    """A DatasetProvider that reads data on the ranks of this process's grid that need it."""
    from megatron.core import parallel_state

    from megatron_hammer.data.provider import DatasetProvider

    def needs_data(vp_stage: int | None) -> bool:
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        # In a whole validation pass every stage must know how many steps it takes.
        is_reading_stage = is_first or is_last or namespace.full_validation
        return is_reading_stage and parallel_state.get_tensor_model_parallel_rank() == 0

    return DatasetProvider(
        build_dataset_config(namespace),
        needs_data,
        select_samples=functools.partial(select_samples, namespace),
        before_first_build=lambda: _record_order(namespace),
    )


def select_samples(namespace: argparse.Namespace, num_samples: Sequence[int | None]) -> tuple[int | None, ...]:
    """What the orders of (train, valid, test) samples are built for, where Megatron asks for `num_samples`.

    Megatron counts as if the run had had its present settings from the start. Where a batch or an evaluation interval
    was another one before, samples would end before the run does. A complete run draws nothing more, but Megatron
    asserts that something is left.
    """
    train, valid, *others = num_samples
    assert train is not None
    iteration = getattr(namespace, "iteration", 0)
    num_consumed = getattr(namespace, "consumed_train_samples", 0)
    if namespace.data_order == MEGATRON:
        train = namespace.data_order_samples or train
    elif num_consumed:
        train = max(train, count_last_sample(namespace, iteration, num_consumed))
    if valid is not None and iteration:
        valid = max(valid, count_last_validation_sample(namespace, iteration, namespace.consumed_valid_samples))
    return max(train, num_consumed + 1), valid, *others


def _record_order(namespace: argparse.Namespace) -> None:
    """Put the record of the data order among Megatron's arguments, the same on every rank, for the checkpoints."""
    import torch

    record = [build_record(namespace) if namespace.rank == 0 else None]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(record, src=0)
    setattr(namespace, RECORD_NAME, record[0])


def build_data_cache(namespace: argparse.Namespace) -> dict[str, int]:
    """Build the sample indices of a run in this one process, into --data-cache-path; training then only maps them.

    Returns {split: number of samples}.
    """
    from megatron.training import get_train_valid_test_num_samples

    from megatron_hammer.data.provider import DatasetProvider

    provider = DatasetProvider(
        build_dataset_config(namespace),
        lambda vp_stage: True,
        select_samples=functools.partial(select_samples, namespace),
    )
    datasets = provider(get_train_valid_test_num_samples())
    counts: dict[str, int] = {}
    for split, dataset in zip(("train", "valid", "test"), datasets, strict=True):
        parts = dataset if isinstance(dataset, list) else [dataset]
        counts[split] = sum(len(part) for part in parts if part is not None)
    return counts


def build_dataset_config(namespace: argparse.Namespace) -> Any:
    """mcore's GPTDatasetConfig, or the epochwise one, for a finalized namespace; its tokenizer is Megatron's global."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_hammer.data.order.epochwise_dataset import EpochwiseGPTDatasetConfig

    blend, blend_per_split = get_blend_and_blend_per_split(namespace)
    config_class = functools.partial(GPTDatasetConfig)
    if namespace.data_order == EPOCHWISE:
        config_class = functools.partial(EpochwiseGPTDatasetConfig, joint_samples=_list_joint_samples(namespace))
    return config_class(
        random_seed=namespace.seed,
        sequence_length=namespace.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        multiple_validation_sets=namespace.multiple_validation_sets,
        full_validation=namespace.full_validation,
        split=namespace.split,
        num_dataset_builder_threads=namespace.num_dataset_builder_threads,
        path_to_cache=namespace.data_cache_path,
        mmap_bin_files=namespace.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=namespace.reset_position_ids,
        reset_attention_mask=namespace.reset_attention_mask,
        eod_mask_loss=namespace.eod_mask_loss,
        create_attention_mask=namespace.create_attention_mask_in_dataloader,
        object_storage_cache_path=namespace.object_storage_cache_path,
        mid_level_dataset_surplus=namespace.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=namespace.allow_ambiguous_pad_tokens,
        fast_cache_load=namespace.dataloader_fast_cache_load,
        defer_npy_index_mmap=namespace.dataloader_defer_npy_index_mmap,
        data_parallel_size=namespace.data_parallel_size,
        context_parallel_size=namespace.context_parallel_size,
    )


def _list_joint_samples(namespace: argparse.Namespace) -> dict[str, int]:
    """The samples that the first block of each training source is built for; empty: one epoch."""
    order = plan_run_order(namespace)
    if order is None:
        return {}
    return {source.prefix: source.num_joint for source in order.sources if source.num_joint is not None}
