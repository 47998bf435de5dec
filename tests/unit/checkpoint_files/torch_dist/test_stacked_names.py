"""Keys of torch_dist for the names of single layers, and back through the reader."""

import pytest
import torch

from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import StackedName, extra_state_key, stack_name
from tests.helpers.toy_checkpoint import write_toy_checkpoint

NAMES = {
    "embedding.word_embeddings.weight": ("embedding.word_embeddings.weight", ()),
    "decoder.layers.11.mlp.linear_fc1.weight": ("decoder.layers.mlp.linear_fc1.weight", (11,)),
    "decoder.layers.2.mlp.experts.experts.40.linear_fc2.weight": (
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        (2, 40),
    ),
    "decoder.layers.0.mlp.shared_experts.gate_weight": ("decoder.layers.mlp.shared_experts.gate_weight", (0,)),
    "decoder.final_layernorm.weight": ("decoder.final_layernorm.weight", ()),
}


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_experts_become_leading_axes(name):
    key, indices = NAMES[name]
    assert stack_name(name) == StackedName(key=key, indices=indices)


def test_the_reader_gives_the_names_back(tmp_path):
    sizes = {0: (5,), 1: (3, 5), 2: (3, 4, 5)}
    tensors = {key: torch.zeros(sizes[len(indices)]) for key, indices in NAMES.values()}
    write_toy_checkpoint(tmp_path, tensors)
    for name, stored in open_checkpoint(tmp_path).tensors.items():
        assert stack_name(name) == StackedName(key=stored.key, indices=stored.offsets[: len(stored.offsets) - 1])


@pytest.mark.parametrize(
    "name, key",
    [
        ("decoder.layers.2.mlp.linear_fc1.layer_norm_weight", "decoder.layers.mlp.linear_fc1._extra_state/shard_2_3"),
        ("decoder.layers.2.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc1._extra_state/shard_2_3"),
        ("decoder.layers.2.mlp.linear_fc1.bias", None),
        (
            "decoder.layers.2.mlp.experts.experts.4.linear_fc1.weight",
            "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_2.4_3.5",
        ),
        ("decoder.layers.2.pre_mlp_layernorm.weight", "decoder.layers.pre_mlp_layernorm._extra_state/shard_2_3"),
        ("decoder.layers.2.mlp.router.weight", None),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm._extra_state/shard_0_1"),
        ("embedding.word_embeddings.weight", None),
        ("output_layer.weight", None),
    ],
)
def test_which_modules_have_an_extra_state(name, key):
    assert extra_state_key(name, num_layers=3, num_experts=5) == key
