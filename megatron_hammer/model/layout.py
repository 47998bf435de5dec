"""How one run is laid over ranks: parallel sizes, the grid of ranks, and what a layout may not be.

Pure arithmetic on Megatron's rank order; nothing here starts a process group. `pipeline_split.py` shares the layers
out, `parameters.py` counts what one rank holds, `memory.py` what it needs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hammer.errors import ConfigError


class RankCoordinates(NamedTuple):
    """Where one rank sits: (tp, cp, dp, pp) in the dense grid, (expert_tp, ep, expert_dp, pp) in the expert grid."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    expert_tp_rank: int
    ep_rank: int
    expert_dp_rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Parallel sizes in mcore's names. Expert parallelism lies inside the data (and context) ranks, not beside them."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1  # chunks a stage; 1 is Megatron's None
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: the tensor-parallel size, as in mcore
    has_sequence_parallel: bool = False
    has_distributed_optimizer: bool = True
    num_layers_first_stage: int | None = None  # --decoder-first-pipeline-num-layers
    num_layers_last_stage: int | None = None  # --decoder-last-pipeline-num-layers
    accounts_for_embedding: bool = False  # --account-for-embedding-in-pipeline-split
    accounts_for_loss: bool = False  # --account-for-loss-in-pipeline-split
    # --pipeline-model-parallel-layout: layers of every chunk, in the order in which a micro-batch passes them. Training
    # refuses this flag; published runs have it.
    chunk_layers: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        return (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def expert_tp(self) -> int:
        """The tensor-parallel size inside an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same experts; ConfigError where they do not come out whole."""
        raise_problems(find_grid_problems(self))
        ranks_per_copy = self.expert_tp * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        return self.world_size // ranks_per_copy

    @property
    def dense_shard_size(self) -> int:
        """Ranks that share one dense optimizer state: mcore reduces and shards over data and context together."""
        return self.data_parallel_size * self.context_parallel_size

    def coordinates(self, rank: int) -> RankCoordinates:
        """The grid position of a global rank, in mcore's default order tp-cp-ep-dp-pp (the first varies fastest).

        Source: megatron.core.parallel_state.RankGenerator; the expert grid reuses the ranks of one pipeline stage as
        tp-ep-dp, so ep is a part of cp x dp. Raises ConfigError for a rank outside the world.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(
                f"rank: must lie in the layout's world, got rank={rank}, world_size={self.world_size}. "
                f"Use 0 to {self.world_size - 1}."
            )
        expert_dp = self.expert_data_parallel_size
        rest, tp_rank = divmod(rank, self.tensor_model_parallel_size)
        rest, cp_rank = divmod(rest, self.context_parallel_size)
        pp_rank, dp_rank = divmod(rest, self.data_parallel_size)
        rest, expert_tp_rank = divmod(rank, self.expert_tp)
        rest, ep_rank = divmod(rest, self.expert_model_parallel_size)
        return RankCoordinates(tp_rank, cp_rank, dp_rank, pp_rank, expert_tp_rank, ep_rank, rest % expert_dp)


def count_shards(layout: ParallelLayout, shard_size: int | None) -> tuple[int, int]:
    """Ranks that share one copy of dense state, and of an expert's. shard_size: those of a dense copy; None: all.

    The ranks that hold the same experts are split into as many copies as the dense ones, however few they are.
    Source: intra_partial_expert_data_parallel_size of megatron.core.parallel_state.
    """
    dense = layout.dense_shard_size
    ranks_per_stage = layout.world_size // layout.pipeline_model_parallel_size
    expert = ranks_per_stage // (layout.expert_tp * layout.expert_model_parallel_size)
    if shard_size is None or shard_size >= dense:
        return dense, expert
    return shard_size, max(1, expert * shard_size // dense)


def find_grid_problems(layout: ParallelLayout) -> tuple[str, ...]:
    """What is wrong with the grid itself, whatever the model: sizes below one, experts that do not tile the ranks."""
    sizes = {
        "tensor-model-parallel-size": layout.tensor_model_parallel_size,
        "pipeline-model-parallel-size": layout.pipeline_model_parallel_size,
        "virtual-pipeline-model-parallel-size": layout.virtual_pipeline_model_parallel_size,
        "context-parallel-size": layout.context_parallel_size,
        "data-parallel-size": layout.data_parallel_size,
        "expert-model-parallel-size": layout.expert_model_parallel_size,
        "expert-tensor-parallel-size": layout.expert_tp,
    }
    problems = [
        f"{flag}: must be at least 1, got {flag}={size}. Pass 1 to switch it off."
        for flag, size in sizes.items()
        if size < 1
    ]
    if problems:
        return tuple(problems)
    ranks_per_stage = layout.world_size // layout.pipeline_model_parallel_size
    expert_block = layout.expert_tp * layout.expert_model_parallel_size
    if ranks_per_stage % expert_block:
        problems.append(
            f"expert-model-parallel-size: expert-tensor x expert must divide the {ranks_per_stage} ranks of a pipeline "
            f"stage, got ep={layout.expert_model_parallel_size}, etp={layout.expert_tp}. "
            f"Use ep * etp from {or_list(divisors(ranks_per_stage))}."
        )
    return tuple(problems)


def raise_problems(problems: tuple[str, ...]) -> None:
    """Raise one ConfigError for all of them, or return if there are none."""
    if problems:
        raise ConfigError(*problems)


def divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return small + [number // candidate for candidate in reversed(small) if candidate * candidate != number]


def or_list(values: list[int]) -> str:
    """[1, 2, 11] -> '1, 2 or 11'."""
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
