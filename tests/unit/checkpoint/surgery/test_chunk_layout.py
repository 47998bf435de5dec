"""The chunks of a layout are those that megatron writes; together they cover the tensor."""

import math

import pytest

from megatron_hammer.checkpoint.surgery.chunk_layout import ShardLayout


def layout(tp: int = 1, etp: int = 1, *, has_gated_mlp: bool = True) -> ShardLayout:
    return ShardLayout(tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp, has_gated_mlp=has_gated_mlp)


# Boxes of one layer as megatron-core 0.19 wrote them in a run at that layout.
FROM_MEGATRON = [
    ("decoder.layers.mlp.linear_fc1.weight", (4, 352, 96), 2, [(0, 0), (88, 0), (176, 0), (264, 0)], (88, 96)),
    ("decoder.layers.mlp.linear_fc1.weight", (4, 352, 96), 1, [(0, 0), (176, 0)], (176, 96)),
    ("decoder.layers.mlp.linear_fc2.weight", (4, 96, 176), 2, [(0, 0), (0, 88)], (96, 88)),
    ("decoder.layers.self_attention.linear_proj.weight", (4, 96, 96), 2, [(0, 0), (0, 48)], (96, 48)),
    ("decoder.layers.self_attention.linear_qkv.weight", (4, 144, 96), 2, [(0, 0), (72, 0)], (72, 96)),
    ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (4, 96), 2, [(0,)], (96,)),
    ("decoder.layers.mlp.linear_fc1.layer_norm_weight", (4, 96), 2, [(0,)], (96,)),
    ("decoder.layers.mlp.router.weight", (4, 4, 96), 2, [(0, 0)], (4, 96)),
    ("decoder.layers.mlp.shared_experts.gate_weight", (4, 1, 96), 2, [(0, 0)], (1, 96)),
]


@pytest.mark.parametrize("prefix", ["", "optimizer.state.exp_avg."])
@pytest.mark.parametrize(("key", "shape", "tp", "offsets", "sizes"), FROM_MEGATRON)
def test_boxes_are_megatrons(prefix, key, shape, tp, offsets, sizes):
    boxes = layout(tp).cut(prefix + key, shape)
    assert boxes == [((layer, *place), (1, *sizes)) for layer in range(4) for place in offsets]


def test_vocabulary_and_experts():
    assert layout(2).cut("output_layer.weight", (1024, 96)) == [((0, 0), (512, 96)), ((512, 0), (512, 96))]
    boxes = layout(4, 2).cut("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 5, 160, 96))
    assert len(boxes) == 3 * 5 * 4
    assert boxes[4] == ((0, 1, 0, 0), (1, 1, 40, 96))
    assert layout(4, 1).cut("decoder.layers.mlp.experts.experts.linear_fc2.weight", (1, 1, 96, 80)) == [
        ((0, 0, 0, 0), (1, 1, 96, 80))
    ]


def test_a_plain_mlp_is_not_cut_between_gate_and_up():
    boxes = layout(2, has_gated_mlp=False).cut("decoder.layers.mlp.linear_fc1.bias", (2, 40))
    assert boxes == [((layer, first), (1, 20)) for layer in range(2) for first in (0, 20)]


@pytest.mark.parametrize("key", ["decoder.layers.3.mlp.linear_fc2.weight", "mtp.layers.eh_proj.weight"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_every_box_set_covers_the_tensor(key, tp):
    boxes = layout(tp).cut(key, (10, 14))
    assert sum(math.prod(sizes) for _, sizes in boxes) == 10 * 14
    assert len(boxes) == (2 if tp == 2 and "fc2" in key else 1)  # what tp does not divide stays whole
