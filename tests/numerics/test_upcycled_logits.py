"""Megatron computes the same logits with an upcycled mixture of experts as with the dense model."""

import re

import pytest
import torch

from megatron_hammer.checkpoint.surgery.upcycle import ExpertShape, upcycle
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.torch_dist.writer import open_checkpoint_writer
from tests.helpers.toy_model import LLAMA
from tests.helpers.whole_model import (
    build_whole_model,
    checkpoint_parameters,
    compute_logits,
    load_weights,
    read_arguments,
    single_rank,
)

TOLERANCE = 5e-7  # measured 6e-8 on logits of up to 0.4, in fp32: sums over experts are in another order


def save(folder, model, namespace):
    """The model as a checkpoint: layers stacked under megatron's keys, every layer a chunk."""
    layers = {}
    with open_checkpoint_writer(folder, iteration=7) as writer:
        for name, tensor in checkpoint_parameters(model).items():
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
            key = f"decoder.layers.{match[2]}" if match else name
            if match:
                layers.setdefault(key, {})[int(match[1])] = tensor
            else:
                layers[key] = tensor
        for key, tensor in layers.items():
            if isinstance(tensor, dict):
                writer.declare(key, (len(tensor), *tensor[0].shape), tensor[0].dtype)
                for layer, part in tensor.items():
                    writer.write_chunk(key, (layer, *([0] * part.dim())), part[None])
            else:
                writer.declare(key, tensor.shape, tensor.dtype)
                writer.write_chunk(key, [0] * tensor.dim(), tensor)
        writer.commit({"args": namespace, "iteration": 7})


@pytest.mark.parametrize(
    ("shape", "is_equal"),
    [
        (ExpertShape(num_experts=6, router_topk=2), True),
        (ExpertShape(num_experts=8, router_topk=4, granularity=2), True),
        (ExpertShape(num_experts=6, router_topk=1, has_pre_softmax=True), False),
    ],
    ids=["copies", "slices", "pre-softmax"],
)
def test_logits(tmp_path, shape, is_equal):
    tokens = torch.randint(0, LLAMA.vocab_size, (2, 23), generator=torch.Generator().manual_seed(6))
    with single_rank():
        namespace = read_arguments(LLAMA)
        dense = build_whole_model(namespace)
        expected = compute_logits(dense, tokens, vocab_size=LLAMA.vocab_size)
        save(tmp_path / "dense", dense, namespace)
        upcycle(tmp_path / "dense", tmp_path / "moe", shape)
        reader = open_checkpoint(tmp_path / "moe")
        flags = ["--num-experts", str(shape.num_experts), "--moe-router-topk", str(shape.router_topk)]
        flags += ["--moe-ffn-hidden-size", str(reader.args.moe_ffn_hidden_size)]
        flags += ["--moe-router-pre-softmax"] if shape.has_pre_softmax else []
        mixture = build_whole_model(read_arguments(LLAMA, flags))
        reader.remove_vocab_padding(LLAMA.vocab_size)
        load_weights(mixture, {name: reader.read(name) for name in reader.tensors})
        found = compute_logits(mixture, tokens, vocab_size=LLAMA.vocab_size)
        for parameter in checkpoint_parameters(mixture).values():
            if parameter.shape[-1] == reader.args.moe_ffn_hidden_size:
                parameter *= 1.01  # the twin: experts that are not the dense MLP
        twin = compute_logits(mixture, tokens, vocab_size=LLAMA.vocab_size)
    difference = (found - expected).abs().max().item()
    print(f"largest difference {difference:.1e} of {expected.abs().max().item():.1f}")
    assert (difference < TOLERANCE) == is_equal
    assert (twin - expected).abs().max().item() > 100 * TOLERANCE
