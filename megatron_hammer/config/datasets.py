"""The data sets of a run: which ranks read them, for how many samples, and the record of their order."""

import functools
from collections.abc import Sequence
from typing import Any

from megatron_hammer.config.arguments import ParsedArguments, build_dataset_config
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.config.saved_run import review_resumed_order
from megatron_hammer.config.training_state import TrainingState
from megatron_hammer.data.order.order import MEGATRON
from megatron_hammer.data.order.review import Record, build_record
from megatron_hammer.platforms.agreement import ask_first_rank
from megatron_hammer.tokenizer.encoding.encoder import hash_tokenizer


def build_dataset_provider(arguments: ParsedArguments, plan: RunPlan, state: TrainingState) -> Any:
    """A DatasetProvider that reads data on the ranks of this process's grid that need it."""
    from megatron.core import parallel_state

    from megatron_hammer.data.provider import DatasetProvider

    def needs_data(vp_stage: int | None) -> bool:
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        # In a whole validation pass every stage must know how many steps it takes. Attention needs the boundaries of
        # packed conversations on every stage.
        has_boundaries = plan.rows is not None and plan.rows.is_packed
        is_reading_stage = is_first or is_last or plan.evaluation.is_whole or has_boundaries
        # The other tensor-parallel ranks get the batch from rank 0 of their group.
        return is_reading_stage and parallel_state.get_tensor_model_parallel_rank() == 0

    return DatasetProvider(
        build_dataset_config(arguments, plan),
        needs_data,
        select_samples=functools.partial(select_samples, plan, state),
        before_first_build=lambda: _record_order(plan, state),
    )


def select_samples(plan: RunPlan, state: TrainingState, num_samples: Sequence[int | None]) -> tuple[int | None, ...]:
    """What the orders of (train, valid, test) samples are built for, where Megatron asks for `num_samples`.

    Megatron counts as if the run had had its present settings from the start. Where the batch or the evaluation
    interval was another one before, the samples would end before the run does. A complete run draws nothing more, but
    Megatron asserts that something is left.
    """
    train, valid, *others = num_samples
    assert train is not None
    # Megatron's order depends on how many samples it is built for, so it must be the same number in every run.
    if plan.data.order == MEGATRON:
        train = plan.data.order_samples or train
    elif state.num_samples:
        train = max(train, plan.count_last_sample(state.iteration, state.num_samples))
    if valid is not None and state.iteration:
        last = plan.count_last_validation_sample(
            state.iteration, state.num_validation_samples, num_steps=state.num_steps
        )
        valid = max(valid, last)
    # MegatronPretrainingSampler (megatron.training.datasets.data_samplers) asserts consumed_samples < total_samples.
    return max(train, state.num_samples + 1), valid, *others


def build_run_record(plan: RunPlan) -> Record | None:
    """What the run's checkpoints say of its data order; None without data."""
    resumed = review_resumed_order(plan)
    return build_record(plan.order, None if resumed is None else resumed[1])


def _record_order(plan: RunPlan, state: TrainingState) -> None:
    """Put the records of data order and tokenizer among Megatron's arguments, on every rank, for the checkpoints."""
    # Only rank 0 reads the checkpoint: many ranks would read the same files from a shared file system.
    path = plan.data.tokenizer_model
    state.data_order, tokenizer_sha256 = ask_first_rank(
        lambda: (build_run_record(plan), None if path is None else hash_tokenizer(path))
    )
    state.record_tokenizer(tokenizer_sha256)


def build_data_cache(arguments: ParsedArguments, plan: RunPlan, state: TrainingState) -> dict[str, int]:
    """Build the sample indices of a run in this one process, into --data-cache-path; training then only maps them.

    Returns {split: number of samples}.
    """
    from megatron.training import get_train_valid_test_num_samples

    from megatron_hammer.data.provider import DatasetProvider

    provider = DatasetProvider(
        build_dataset_config(arguments, plan),
        # There is no process grid here; this one process builds the indices of every split.
        lambda vp_stage: True,
        select_samples=functools.partial(select_samples, plan, state),
    )
    datasets = provider(get_train_valid_test_num_samples())
    counts: dict[str, int] = {}
    for split, dataset in zip(("train", "valid", "test"), datasets, strict=True):
        # With several validation sets, Megatron gives a list for that split.
        parts = dataset if isinstance(dataset, list) else [dataset]
        counts[split] = sum(len(part) for part in parts if part is not None)
    return counts
