"""A whole training checkpoint by hand: weights, an optimizer in either of its forms, random states, arguments."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.pickle_writer import dump_object
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.checkpoint_files.torch_dist.writer import open_checkpoint_writer
from tests.helpers.toy_checkpoint import cut
from tests.helpers.toy_model import PLAIN_MOE_ARGUMENTS, draw_weights, stack_layers, toy_arguments

NUM_LAYERS = 4  # two stages of two chunks each hold one layer per chunk
NUM_EXPERTS = 6  # two expert-parallel ranks, or three, hold equal parts
LAYOUT_ARGUMENTS = {
    "num_layers": NUM_LAYERS,
    "make_vocab_size_divisible_by": 16,
    "tensor_model_parallel_size": 1,
    "tensor_parallel_num_weight_shards": 1,
    "pipeline_model_parallel_size": 1,
    "transformer_pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "context_parallel_size": 1,
    "data_parallel_size": 1,
    "world_size": 1,
    "sequence_parallel": False,
    "use_distributed_optimizer": True,
    "use_rotary_position_embeddings": False,
    "rotary_percent": 1.0,
    "qk_layernorm": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "moe_router_pre_softmax": False,
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_aux_loss_coeff": 0.0,
    "consumed_valid_samples": 16,
    "skipped_train_samples": 0,
    "data_order_record": {"starts": [0]},
}
RNG_KEY, RERUN_KEY = "rng_state/shard_0.0_1.1", "rerun_state_machine_state/shard_0_1"
MATRIX_GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "lr": 0.1, "max_lr": 0.5, "min_lr": 0.0, "step": 10}
MATRIX_GROUP |= {"is_decoupled_lr": False, "is_expert_parallel": False, "betas": (0.9, 0.95)}
VECTOR_GROUP = {**MATRIX_GROUP, "wd_mult": 0.0}


def training_arguments(*, is_moe: bool = False, **changes: Any) -> Namespace:
    experts = {**PLAIN_MOE_ARGUMENTS, "num_experts": NUM_EXPERTS} if is_moe else {}
    return toy_arguments(**(LAYOUT_ARGUMENTS | experts | changes))


def model_tensors(*, is_moe: bool = False, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Random weights under the keys of torch_dist."""
    return stack_layers(draw_weights(training_arguments(is_moe=is_moe), dtype=dtype, seed=seed))


def optimizer_tensors(model: dict[str, Tensor], *, master: str = "param") -> dict[str, Tensor]:
    """fp32 weights that round to the model's, and moments, under the keys of torch_dist."""
    generator = torch.Generator().manual_seed(99)
    state = {}
    for key, tensor in model.items():
        noise = torch.rand(tensor.shape, generator=generator) * 1e-4 * (tensor.dtype != torch.float32)
        state[f"optimizer.state.{master}.{key}"] = tensor.float() * (1 + noise)
        state[f"optimizer.state.exp_avg.{key}"] = torch.randn(tensor.shape, generator=generator)
        state[f"optimizer.state.exp_avg_sq.{key}"] = torch.rand(tensor.shape, generator=generator)
    return state


def optimizer_state(*, is_chained: bool = False) -> dict[Any, Any]:
    """What the common state holds of the distributed optimizer."""
    sharding = {"param_state_sharding_type": "fully_reshardable"}
    dense = {"optimizer": {"param_groups": [dict(MATRIX_GROUP), dict(VECTOR_GROUP)]}, **sharding}
    if not is_chained:
        return dense
    group = {**MATRIX_GROUP, "is_expert_parallel": True}
    return {0: dense, 1: {"optimizer": {"param_groups": [group]}, **sharding}}


def write_training_checkpoint(
    directory: Path,
    *,
    is_moe: bool = False,
    arguments: Namespace | None = None,
    tensors: dict[str, Tensor] | None = None,
    optimizer: dict[Any, Any] | None = None,
    sharding: str = "fully_reshardable",
    iteration: int | None = 10,
    objects: Sequence[str] = (RNG_KEY, RERUN_KEY, "decoder.layers.mlp.linear_fc1._extra_state/shard_1_4"),
) -> dict[str, Tensor]:
    """Write one with every tensor cut in two along its first and last axes; returns its tensors."""
    if tensors is None:
        model = model_tensors(is_moe=is_moe)
        tensors = {**model, **optimizer_tensors(model)}
    state = {
        "args": arguments or training_arguments(is_moe=is_moe),
        "iteration": iteration or 10,
        "checkpoint_version": 3.0,
        "optimizer": optimizer or optimizer_state(),
        "opt_param_scheduler": {"num_steps": 80},
        "rerun_state_machine": {"mode": "off"},
        "num_floating_point_operations_so_far": 1e9,
        "content_metadata": {"distrib_optim_sharding_type": sharding, "chained_optim_avoid_prefix": True},
    }
    with open_checkpoint_writer(directory, iteration=iteration) as writer:
        for key, tensor in tensors.items():
            writer.declare(key, tensor.shape, tensor.dtype)
            for offsets, chunk in cut(tensor, 2):
                writer.write_chunk(key, offsets, chunk)
        for key in objects:
            writer.write_object_bytes(key, dump_object([f"state of {key}"]))
        writer.commit(state)
    return tensors


def read_all(directory: Path, name: str = "iter_0000010") -> tuple[dict[str, Tensor], TorchDistStore]:
    """Every tensor of a checkpoint, whole, and the store that it was read from."""
    store = TorchDistStore(directory / name)
    store.validate()
    whole = {key: store.read(key, [0] * len(found.shape), found.shape) for key, found in store.tensors.items()}
    return whole, store
