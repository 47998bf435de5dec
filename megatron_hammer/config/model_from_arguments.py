"""The layout that a namespace asks for. What Megatron derives when a flag is left out is derived here by the same rule.

`model_arguments.py` reads the model. Pure; no torch, no megatron.
"""

import argparse
import math

from megatron_hammer.model.accounting import ParallelLayout


def count_ranks_of_model(namespace: argparse.Namespace) -> int:
    """Ranks that hold one copy of the model between them: tp x pp x cp."""
    return (
        namespace.tensor_model_parallel_size * namespace.pipeline_model_parallel_size * namespace.context_parallel_size
    )


def count_least_world_size(namespace: argparse.Namespace) -> int:
    """The smallest world that the parallel sizes fit in: tp x pp x cp, widened until the experts tile a stage."""
    tp = namespace.tensor_model_parallel_size
    ranks_per_stage = tp * namespace.context_parallel_size
    expert_block = namespace.expert_model_parallel_size * (namespace.expert_tensor_parallel_size or tp)
    if min(ranks_per_stage, expert_block, namespace.pipeline_model_parallel_size) < 1:
        return 1  # preflight reports the size that is not positive
    return math.lcm(ranks_per_stage, expert_block) * namespace.pipeline_model_parallel_size


def virtual_size(namespace: argparse.Namespace) -> int:
    """Model chunks a stage, from either of Megatron's two flags; 1 without interleaving.

    --num-layers-per-virtual-pipeline-stage must divide the layers of a stage, which preflight checks.
    """
    if namespace.num_virtual_stages_per_pipeline_rank is not None:
        return namespace.num_virtual_stages_per_pipeline_rank
    if namespace.num_layers_per_virtual_pipeline_stage is None:
        return 1
    slots = namespace.num_layers
    slots += int(namespace.account_for_embedding_in_pipeline_split) + int(namespace.account_for_loss_in_pipeline_split)
    return slots // namespace.pipeline_model_parallel_size // namespace.num_layers_per_virtual_pipeline_stage


def build_layout(namespace: argparse.Namespace) -> ParallelLayout:
    """The layout, with as many data-parallel copies as fit in the world (at least one)."""
    return ParallelLayout(
        tensor_model_parallel_size=namespace.tensor_model_parallel_size,
        pipeline_model_parallel_size=namespace.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size(namespace),
        context_parallel_size=namespace.context_parallel_size,
        data_parallel_size=max(1, namespace.world_size // count_ranks_of_model(namespace)),
        expert_model_parallel_size=namespace.expert_model_parallel_size,
        expert_tensor_parallel_size=namespace.expert_tensor_parallel_size,
        has_sequence_parallel=namespace.sequence_parallel and namespace.tensor_model_parallel_size > 1,
        has_distributed_optimizer=namespace.use_distributed_optimizer,
        num_layers_first_stage=namespace.decoder_first_pipeline_num_layers,
        num_layers_last_stage=namespace.decoder_last_pipeline_num_layers,
        accounts_for_embedding=namespace.account_for_embedding_in_pipeline_split,
        accounts_for_loss=namespace.account_for_loss_in_pipeline_split,
    )
