"""A legacy `mp_rank_*` checkpoint written by hand: what Megatron writes with --ckpt-format torch, of any age."""

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tensor_parallel_parts import split_by_name
from tests.helpers.toy_model import GPT2_ARGUMENTS, draw_weights, toy_arguments

NUM_LAYERS = 4  # two stages of two chunks each hold one layer per chunk
# Sequence of a layer's tensors in a model of before megatron-core, with their mcore names.
OLD_LAYER = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "attention.query_key_value": "self_attention.linear_qkv.",
    "attention.dense": "self_attention.linear_proj.",
    "post_attention_layernorm": "mlp.linear_fc1.layer_norm_",
    "mlp.dense_h_to_4h": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h": "mlp.linear_fc2.",
}


def llama_weights() -> dict[str, Tensor]:
    return draw_weights(legacy_arguments(), seed=3)


def gpt2_weights() -> dict[str, Tensor]:
    return draw_weights(legacy_arguments(**GPT2_ARGUMENTS), seed=4)


def legacy_arguments(**changes: Any) -> Namespace:
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    return toy_arguments(**({"num_layers": NUM_LAYERS} | sizes | changes))


def write_legacy_checkpoint(
    directory: Path,
    weights: Mapping[str, Tensor],
    *,
    tp: int = 1,
    stages: tuple[tuple[int, ...], ...] = ((NUM_LAYERS,),),
    arguments: Namespace | None = None,
    iteration: int = 10,
    checkpoint_version: float = 3.0,
    change: Callable[[dict[str, Any], int, int], None] = lambda state, tp_rank, pp_rank: None,
    **save_options: Any,
) -> Path:
    """Write `directory/iter_<iteration>` and the tracker; stages[pp_rank] has the number of layers of every chunk.

    `change` may damage the state of a rank before it is saved. Returns the iteration's directory.
    """
    pp = len(stages)
    args = arguments or legacy_arguments(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    target = directory / f"iter_{iteration:07d}"
    target.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            chunks = [
                _rank_chunk(weights, args, tp, tp_rank, stages, pp_rank, vp_stage)
                for vp_stage in range(len(stages[pp_rank]))
            ]
            models = {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": part for i, part in enumerate(chunks)}
            state = {"args": args, "iteration": iteration, "checkpoint_version": checkpoint_version, **models}
            change(state, tp_rank, pp_rank)
            folder = target / (f"mp_rank_{tp_rank:02d}_{pp_rank:03d}" if pp > 1 else f"mp_rank_{tp_rank:02d}")
            folder.mkdir()
            torch.save(state, folder / "model_optim_rng.pt", **save_options)
    return target


def _rank_chunk(
    weights: Mapping[str, Tensor],
    args: Namespace,
    tp: int,
    tp_rank: int,
    stages: tuple[tuple[int, ...], ...],
    pp_rank: int,
    vp_stage: int,
) -> dict[str, Tensor]:
    first = sum(sum(stage[:vp_stage]) for stage in stages) + sum(stage[vp_stage] for stage in stages[:pp_rank])
    is_first, is_last = (pp_rank, vp_stage) == (0, 0), (pp_rank, vp_stage) == (len(stages) - 1, len(stages[-1]) - 1)
    chunk = {}
    for name, tensor in weights.items():
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer is not None:
            local = int(layer[1]) - first
            is_here, own_name = 0 <= local < stages[pp_rank][vp_stage], name.replace(layer[1], str(local), 1)
        else:
            is_here, own_name = is_first if name.startswith("embedding.") else is_last, name
        if is_here:
            chunk[own_name] = split_by_name(name, tensor, tp, is_gated=args.swiglu)[tp_rank].clone()
    if is_last and not is_first and not args.untie_embeddings_and_output_weights:
        chunk["output_layer.weight"] = weights["embedding.word_embeddings.weight"].chunk(tp)[tp_rank].clone()
    return chunk
