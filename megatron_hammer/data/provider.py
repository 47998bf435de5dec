"""Megatron's train/validation/test datasets for a run: weighted blends of .bin/.idx prefixes, or mock data.

The prefixes are of text, or of conversations for supervised fine-tuning.
"""

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_hammer.data.conversations.dataset import ConversationDataset, ConversationDatasetConfig
from megatron_hammer.data.order.epochwise_dataset import EpochwiseGPTDataset, EpochwiseGPTDatasetConfig


class DatasetProvider:
    """Megatron's train_valid_test_dataset_provider: called with (train, valid, test) sample counts and a vp_stage.

    needs_data: whether this rank reads data for that virtual stage (first or last pipeline stage, or every stage where
    samples have boundaries; first of its tensor-parallel group). select_samples: what the orders are built for, from
    the numbers that Megatron asks for. before_first_build: called once, on every rank.
    """

    is_distributed = True  # Megatron then calls it on every rank; mcore's builder synchronises them

    def __init__(
        self,
        dataset_config: BlendedMegatronDatasetConfig,
        needs_data: Callable[[int | None], bool],
        *,
        select_samples: Callable[[Sequence[int | None]], Sequence[int | None]] = lambda num_samples: num_samples,
        before_first_build: Callable[[], None] = lambda: None,
    ):
        self.dataset_config = dataset_config
        self.needs_data = needs_data
        self.select_samples = select_samples
        self._before_first_build: Callable[[], None] | None = before_first_build

    def __call__(self, num_samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
        if self._before_first_build is not None:
            self._before_first_build()
            # Megatron calls the provider once for each virtual pipeline stage.
            self._before_first_build = None
        builder = BlendedMegatronDatasetBuilder(
            select_dataset_class(self.dataset_config),
            self.select_samples(num_samples),
            # Ranks without data still take part in the builder's barriers.
            lambda: self.needs_data(vp_stage),
            self.dataset_config,
        )
        return builder.build()


def select_dataset_class(config: BlendedMegatronDatasetConfig) -> type[MegatronDataset]:
    if isinstance(config, ConversationDatasetConfig):
        return ConversationDataset
    if config.mock:
        return MockGPTDataset
    return EpochwiseGPTDataset if isinstance(config, EpochwiseGPTDatasetConfig) else GPTDataset
