"""Every expert is the dense MLP, or its slices in turn; the sum over a token's experts is what the MLP computes."""

import re

import pytest
import torch

from megatron_hammer.checkpoint.surgery.upcycle import ExpertShape, build_router, slice_gate_up, upcycle
from megatron_hammer.errors import ConversionError
from tests.helpers.messages import assert_problems
from tests.helpers.toy_training_checkpoint import model_tensors, read_all, training_arguments, write_training_checkpoint

FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
EXPERT_FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
EXPERT_FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"


def upcycle_toy(folder, shape, **options):
    tensors = write_training_checkpoint(folder / "dense", **options)
    report = upcycle(folder / "dense", folder / "moe", shape)
    found, store = read_all(folder / "moe", "release")
    return tensors, found, store, report


def test_whole_copies(tmp_path):
    tensors, found, store, report = upcycle_toy(tmp_path, ExpertShape(num_experts=5, router_topk=3))
    dense_keys = {key for key in tensors if not key.startswith("optimizer.")}
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    moved = {EXPERT_FC1, EXPERT_FC2, "decoder.layers.mlp.router.weight", "decoder.layers.pre_mlp_layernorm.weight"}
    assert found.keys() == dense_keys - {FC1, FC2, norm} | moved
    for expert in range(5):
        assert torch.equal(found[EXPERT_FC1][:, expert], tensors[FC1])
        assert torch.equal(found[EXPERT_FC2][:, expert], tensors[FC2])
    assert torch.equal(found["decoder.layers.pre_mlp_layernorm.weight"], tensors[norm])
    for key in dense_keys - {FC1, FC2, norm}:
        assert torch.equal(found[key], tensors[key])
    args = store.common_state["args"]
    saved = (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size, args.moe_router_pre_softmax)
    assert saved == (5, 3, 20, False)
    assert "optimizer" not in store.common_state
    extra = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1"
    norm_state = "decoder.layers.pre_mlp_layernorm._extra_state/shard_1_4"
    assert store.objects == (*(f"{extra}.{expert}_4.5" for expert in range(5)), norm_state)
    assert (report.num_experts, report.expert_ffn_hidden_size, report.is_exact) == (5, 20, True)
    assert report.num_parameters == sum(tensor.numel() for tensor in found.values())


def test_slices_in_turn(tmp_path):
    shape = ExpertShape(num_experts=6, router_topk=4, granularity=2)
    tensors, found, _, report = upcycle_toy(tmp_path, shape)
    assert report.expert_ffn_hidden_size == 10
    for expert in range(6):
        part = slice(0, 10) if expert % 2 == 0 else slice(10, 20)
        gate, up = tensors[FC1].chunk(2, dim=1)
        assert torch.equal(found[EXPERT_FC1][:, expert], torch.cat([gate[:, part], up[:, part]], dim=1))
        assert torch.equal(found[EXPERT_FC2][:, expert], 2 * tensors[FC2][:, :, part])
    router = found["decoder.layers.mlp.router.weight"]
    assert torch.equal(router[:, 0::2], router[:, 1::2])  # a virtual group is chosen together
    assert not torch.equal(router[:, 0], router[:, 2])
    assert not torch.equal(router[0], router[1])


def test_the_width_of_an_expert_says_the_granularity(tmp_path):
    write_training_checkpoint(tmp_path / "dense")
    shape = ExpertShape(num_experts=8, router_topk=4)
    report = upcycle(tmp_path / "dense", tmp_path / "moe", shape, expert_ffn_hidden_size=5)
    assert report.expert_ffn_hidden_size == 5
    assert read_all(tmp_path / "moe", "release")[0][EXPERT_FC2].shape == (4, 8, 24, 5)
    for wrong, granularity in ((6, 1), (5, 2), (0, 1)):
        shape = ExpertShape(num_experts=8, router_topk=4, granularity=granularity)
        text = f"moe-ffn-hidden-size: must be ffn_hidden_size over the granularity, got moe_ffn_hidden_size={wrong}, "
        with pytest.raises(ConversionError, match=re.escape(text)):
            upcycle(tmp_path / "dense", tmp_path / "new", shape, expert_ffn_hidden_size=wrong)


def swiglu(x, fc1, fc2):
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ fc2.T


def mixture(x, router, fc1, fc2, shape):
    """Megatron's router and experts, written out. x: [tokens, h]."""
    logits = x @ router.T
    if shape.has_pre_softmax:
        weights, chosen = logits.softmax(dim=-1).topk(shape.router_topk)
    else:
        top, chosen = logits.topk(shape.router_topk)
        weights = top.softmax(dim=-1)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            out[token] += weight * swiglu(x[token], fc1[expert], fc2[expert])
    return out


@pytest.mark.parametrize(
    "shape",
    [
        ExpertShape(num_experts=5, router_topk=2),
        ExpertShape(num_experts=6, router_topk=4, granularity=2),
        ExpertShape(num_experts=10, router_topk=5, granularity=5),
    ],
)
def test_a_layer_computes_the_same_function(tmp_path, shape):
    model = {key: tensor.double() for key, tensor in model_tensors().items()}
    tensors, found, _, _ = upcycle_toy(tmp_path, shape, tensors=model)
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    router, fc1, fc2 = (found[key][1] for key in ("decoder.layers.mlp.router.weight", EXPERT_FC1, EXPERT_FC2))
    dense = swiglu(x, tensors[FC1][1], tensors[FC2][1])
    # fc2's factor 5 is rounded in fp32; 1 and 2 are exact
    tolerance = 1e-6 if shape.granularity == 5 else 1e-12
    torch.testing.assert_close(mixture(x, router, fc1, fc2, shape), dense, rtol=tolerance, atol=tolerance)
    # The twin: without the factor, or with another group's slices, it is another function.
    if shape.granularity > 1:
        assert not torch.allclose(mixture(x, router, fc1, fc2 / shape.granularity, shape), dense, rtol=0.1)
        assert not torch.allclose(mixture(x, router, fc1.roll(1, dims=0), fc2, shape), dense, rtol=0.1)


def test_softmax_over_all_experts_is_near_and_says_so(tmp_path):
    shape = ExpertShape(num_experts=6, router_topk=2, has_pre_softmax=True, router_std=1e-4)
    model = {key: tensor.double() for key, tensor in model_tensors().items()}
    tensors, found, store, report = upcycle_toy(tmp_path, shape, tensors=model)
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    router, fc1, fc2 = (found[key][1] for key in ("decoder.layers.mlp.router.weight", EXPERT_FC1, EXPERT_FC2))
    dense = swiglu(x, tensors[FC1][1], tensors[FC2][1])
    near = mixture(x, router, fc1, fc2, shape)
    torch.testing.assert_close(near, dense, rtol=3e-3, atol=0)  # the chosen weights are 1/6 within exp(2 * 5e-4)
    assert not torch.allclose(near, dense, rtol=1e-6)
    assert not report.is_exact
    assert store.common_state["args"].moe_router_pre_softmax is True


def test_the_router_is_random_by_seed_and_layer(tmp_path):
    shape = ExpertShape(num_experts=400, router_topk=2)
    rows = build_router(0, shape, hidden_size=50, std=0.02)
    assert torch.equal(rows, build_router(0, shape, hidden_size=50, std=0.02))
    assert not torch.equal(rows, build_router(1, shape, hidden_size=50, std=0.02))
    other = ExpertShape(num_experts=400, router_topk=2, seed=5)
    assert not torch.equal(rows, build_router(0, other, hidden_size=50, std=0.02))
    assert abs(rows.std().item() - 0.02) < 4 * 0.02 / (2 * rows.numel()) ** 0.5


def test_slices_of_a_plain_mlp_are_not_cut_between_gate_and_up():
    rows = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(slice_gate_up(rows, granularity=3, part=1, is_gated=False), rows[2:4])
    assert torch.equal(slice_gate_up(rows, granularity=3, part=1, is_gated=True), rows[[1, 4]])


def test_all_reasons_against_upcycling_are_named_at_once(tmp_path):
    write_training_checkpoint(tmp_path / "moe", is_moe=True, arguments=training_arguments(is_moe=True))
    with pytest.raises(ConversionError) as caught:
        upcycle(tmp_path / "moe", tmp_path / "new", ExpertShape(num_experts=7, router_topk=9, granularity=3))
    assert_problems(
        caught.value.problems,
        (f"{tmp_path / 'moe' / 'iter_0000010'}:", "model must be dense", "got num_experts=6"),
        (
            "moe-upcycling-granularity:",
            "must divide ffn_hidden_size",
            "got moe_upcycling_granularity=3, ffn_hidden_size=20",
        ),
        ("moe-router-topk:", "must be between 1 and num_experts", "got moe_router_topk=9, num_experts=7"),
        ("num-experts:", "must be a multiple", "got num_experts=7, moe_upcycling_granularity=3", "multiple of 3"),
    )


@pytest.mark.parametrize(
    ("shape", "arguments", "text"),
    [
        (ExpertShape(num_experts=1, router_topk=1, has_pre_softmax=True), {}, "num-experts: must be at least 2, got"),
        (ExpertShape(num_experts=4, router_topk=1), {}, "moe-router-pre-softmax: must be on where one expert is cho"),
        (ExpertShape(num_experts=4, router_topk=3, granularity=2), {}, "moe-router-topk: must be a multiple of the gr"),
        (ExpertShape(num_experts=4, router_topk=2, granularity=0), {}, "moe-upcycling-granularity: must divide ffn_hi"),
        (
            ExpertShape(num_experts=4, router_topk=2, router_std=-1.0),
            {},
            "router-init-std: must be positive and finite",
        ),
        (ExpertShape(num_experts=4, router_topk=2), {"add_bias_linear": True}, "MLP must have no biases, as experts"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path, shape, arguments, text):
    write_training_checkpoint(tmp_path / "dense", arguments=training_arguments(**arguments))
    with pytest.raises(ConversionError, match=re.escape(text)):
        upcycle(tmp_path / "dense", tmp_path / "moe", shape)
    assert not (tmp_path / "moe").exists()


def test_layers_that_differ_are_refused(tmp_path):
    tensors = model_tensors()
    fc1 = tensors.pop(FC1)
    tensors |= {f"decoder.layers.{layer}.mlp.linear_fc1.weight": fc1[layer] for layer in range(4)}
    write_training_checkpoint(tmp_path / "dense", tensors=tensors)
    with pytest.raises(ConversionError, match="Only GPT and Llama models with equal layers can be upcycled"):
        upcycle(tmp_path / "dense", tmp_path / "moe", ExpertShape(num_experts=4, router_topk=2))
