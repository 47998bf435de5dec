"""Megatron's train/validation/test datasets for a run: weighted blends of .bin/.idx prefixes, or mock data."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset


class DatasetProvider:
    """Megatron's train_valid_test_dataset_provider: called with (train, valid, test) sample counts and a vp_stage.

    needs_data: whether this rank reads data for that virtual stage (first or last pipeline stage, first of its
    tensor-parallel group).
    """

    is_distributed = True  # Megatron then calls it on every rank; mcore's builder synchronises them

    def __init__(self, dataset_config: GPTDatasetConfig, needs_data: Callable[[int | None], bool]):
        self.dataset_config = dataset_config
        self.needs_data = needs_data

    def __call__(self, num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
        dataset_class = MockGPTDataset if self.dataset_config.mock else GPTDataset
        builder = BlendedMegatronDatasetBuilder(
            dataset_class, num_samples, lambda: self.needs_data(vp_stage), self.dataset_config
        )
        return builder.build()
