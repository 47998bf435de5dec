"""A data set in the epochwise order: extending a run keeps every sample already drawn in its place.

megatron-core's GPTDataset shuffles all epochs of a run together, so its order depends on the run's length; this one
shuffles epoch by epoch (data/order.py has the order itself). Everything else, samples and their masks included, is
GPTDataset's. The class name and `joint_samples` are part of the cache's description, so no other order's cache is used.
"""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_hammer.data.order.order import EPOCHWISE, EpochPlan, build_document_order, build_sample_order, plan_epochs

INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")


@dataclass
class EpochwiseGPTDatasetConfig(GPTDatasetConfig):
    """joint_samples: {prefix: samples} that the first block of a training source is built for; else one epoch."""

    joint_samples: dict[str, int] = field(default_factory=dict)


class EpochwiseGPTDataset(GPTDataset):
    """Shuffles its first epoch as GPTDataset does, and each later epoch by itself."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Part of the description whose hash names the cache files: another first block is another order.
        return [*GPTDataset._key_config_attributes(), "joint_samples"]

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        return self._plan_epochs(num_tokens_per_epoch).num_epochs

    def _plan_epochs(self, epoch_tokens: int) -> EpochPlan:
        is_training = self.index_split == Split.train
        return plan_epochs(
            self.num_samples,
            epoch_tokens,
            self.config.sequence_length,
            order=EPOCHWISE,
            joint_samples=self.config.joint_samples.get(self.dataset_path) if is_training else None,
        )

    def _build_document_sample_shuffle_indices(self) -> Any:
        """(document index, sample index, shuffle index), from the cache, which the first rank fills."""
        # Megatron then maps the files itself, later, from a cache that must be complete.
        if self.config.defer_npy_index_mmap:
            return super()._build_document_sample_shuffle_indices()
        # The same places as GPTDataset's own cache.
        directory = self.config.path_to_cache or os.path.join(
            self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices"
        )
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        paths = [Path(directory, f"{base}-{name}.npy") for name in INDEX_NAMES]
        is_cached = self.config.fast_cache_load or all(path.is_file() for path in paths)
        is_first_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not is_cached and is_first_rank:
            self._write_cache(paths, Path(directory, f"{base}-description.txt"), self._build_indices())
        return tuple(np.load(path, mmap_mode="r") for path in paths)

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from megatron.core.datasets import helpers

        seed, seq_length = self.config.random_seed, self.config.sequence_length
        epoch_tokens = self._get_num_tokens_per_epoch()
        plan = self._plan_epochs(epoch_tokens)
        # One generator for both orders, first documents and then samples: that is the sequence of draws in GPTDataset.
        generator = np.random.RandomState(seed)
        document_index = build_document_order(self.indices, plan, seed=seed, generator=generator)
        sample_index = helpers.build_sample_idx(
            self.dataset.sequence_lengths, document_index, seq_length, plan.num_epochs, epoch_tokens, True, True
        )
        shuffle_index = build_sample_order(plan, epoch_tokens, seq_length, seed=seed, generator=generator)
        return document_index, sample_index, shuffle_index

    def _write_cache(self, paths: list[Path], description_path: Path, indices: tuple[np.ndarray, ...]) -> None:
        """Each file under a name of its own first, so that a run that is killed leaves no half of one.

        Threads build a blend's sources, and one source may be named twice.
        """
        description_path.parent.mkdir(parents=True, exist_ok=True)
        description_path.write_text(self.unique_description)
        for path, array in zip(paths, indices, strict=True):
            # With process and thread in the name, two writers of the same file do not write into one another.
            partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
            with partial.open("wb") as file:
                np.save(file, array)
            partial.replace(path)
