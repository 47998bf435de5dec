"""Exact integers about a model on a layout, before anything is built: one import for the arithmetic of this folder.

`layout.py` places ranks, `pipeline_split.py` shares layers out, `parameters.py` counts weights, `flops.py` counts the
work per token, `memory/` estimates the bytes of a GPU. None of it loads torch or megatron, so it runs on a login
node. Tests compare it with the installed megatron-core and transformers.
"""

from megatron_hammer.model.flops import FLOP_CONVENTIONS, FlopConvention, count_attended_keys, count_flops_per_token
from megatron_hammer.model.layout import ParallelLayout, RankCoordinates, find_grid_problems
from megatron_hammer.model.memory.estimate import StageMemory, count_in_flight, estimate_memory
from megatron_hammer.model.memory.options import MemoryOptions
from megatron_hammer.model.parameters import (
    RankParameters,
    count_active_parameters,
    count_optimizer_shard,
    count_parameters,
    count_rank_parameters,
    count_stage_parameters,
    find_shard_problems,
    padded_vocab_size,
)
from megatron_hammer.model.pipeline_split import LayerRange, find_split_problems, split_layers
