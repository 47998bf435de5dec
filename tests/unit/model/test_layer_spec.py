"""Both backends write the same checkpoint: TransformerEngine's names, with each norm inside the layer behind it."""

import copy
import dataclasses
import inspect

import pytest
import torch

from megatron_hammer.model import layer_spec
from megatron_hammer.model.shape import ModelShape
from tests.helpers.toy_model import GPT2, LLAMA, MOE
from tests.helpers.whole_model import build_whole_model, read_arguments, single_rank

ENDS = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
ATTENTION = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
)
DENSE = (*ATTENTION, "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
MOE_LAYER = (
    *ATTENTION,
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_experts.gate_weight",
)
GPT = (
    *DENSE,
    "self_attention.linear_qkv.layer_norm_bias",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.bias",
    "mlp.linear_fc1.layer_norm_bias",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.bias",
)


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def list_keys(model: ModelShape, *flags: str) -> list[str]:
    """Names in a checkpoint of this model, in order; TransformerEngine's fp8 scales (_extra_state) carry no weights."""
    state = build_whole_model(read_arguments(model, flags)).sharded_state_dict()
    return sorted({value.key for value in state.values() if not value.key.endswith("_extra_state")})


def layers(names: tuple[str, ...]) -> list[str]:
    return [f"decoder.layers.{name}" for name in names]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (LLAMA, [*ENDS, *layers(DENSE)]),
        (MOE, [*ENDS, *layers(MOE_LAYER)]),
        (
            GPT2,
            [*ENDS[:2], "embedding.position_embeddings.weight", "decoder.final_layernorm.bias", *layers(GPT)],
        ),
    ],
    ids=["llama", "mixture of experts", "gpt"],
)
def test_checkpoint_names(model: ModelShape, expected: list[str]) -> None:
    assert list_keys(model) == sorted(expected)


def test_dense_layers_among_mixtures_have_names_of_their_own() -> None:
    """Megatron stacks only layers that are all alike; and --moe-layer-freq 1 is alike."""
    bias = {"score_function": "sigmoid", "has_expert_bias": True}
    moe = dataclasses.replace(MOE.moe, dense_layers=(1,), **bias)
    mixture = (*MOE_LAYER, "mlp.router.expert_bias")
    expected = [f"decoder.layers.{layer}.{name}" for layer in (0, 2) for name in mixture]
    expected += [f"decoder.layers.1.{name}" for name in DENSE]
    assert list_keys(dataclasses.replace(MOE, moe=moe)) == sorted([*ENDS, *expected])


@pytest.mark.parametrize("backend", ["torch", "te"])
def test_a_stage_has_its_own_layers(monkeypatch, backend) -> None:
    config = copy.copy(build_whole_model(read_arguments(MOE)).config)
    config.num_layers = 6
    monkeypatch.setattr(layer_spec, "build_layer_spec", lambda config, backend, is_mixture, **_: is_mixture)
    monkeypatch.setattr(layer_spec, "_te_norm", lambda: "TENorm")
    monkeypatch.setattr(layer_spec, "get_transformer_layer_offset", lambda config, vp_stage: 2)
    monkeypatch.setattr(layer_spec, "get_num_layers_to_build", lambda config, vp_stage: 3)
    for frequency, expected in ((2, [True, False, True]), ([0, 0, 0, 1, 1, 1], [False, True, True])):
        config.moe_layer_freq = frequency
        assert layer_spec.build_block_spec(config, backend).layer_specs == expected


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0])])
def test_output_and_bias_are_multiplied_before_the_residual_is_added(is_fused: bool, bias: torch.Tensor | None) -> None:
    output, residual = torch.randn(3, 2), torch.randn(3, 2)
    add = layer_spec._scale_residual_branch(0.22)(False, is_fused)
    expected = residual + 0.22 * (output if bias is None else output + bias)
    torch.testing.assert_close(add((output.clone(), bias), residual, 0.0), expected)


def test_the_embedding_norm_has_a_name_of_its_own() -> None:
    with_norm = list_keys(LLAMA, "--embedding-norm")
    assert set(with_norm) - set(list_keys(LLAMA)) == {"embedding_norm.weight", "embedding_norm.bias"}


def test_modules_are_torchs() -> None:
    from megatron_hammer.model.torch_modules import SdpaAttention

    layer = build_whole_model(read_arguments(LLAMA)).decoder.layers[1]
    assert isinstance(layer.self_attention.core_attention, SdpaAttention)
    assert (
        type(layer.input_layernorm).__module__
        == type(layer.pre_mlp_layernorm).__module__
        == "torch.nn.modules.normalization"
    )
    assert layer.self_attention.linear_qkv.weight.shape == (40, 24)  # (6 + 2 * 2) heads of 4


def test_each_backend_builds_its_own_spec(monkeypatch) -> None:
    from megatron_hammer.model import layer_spec
    from megatron_hammer.model.torch_modules import TorchNorm

    config = build_whole_model(read_arguments(LLAMA)).config
    block = layer_spec.build_block_spec(config, "torch")
    assert block.layer_norm is TorchNorm
    assert len(block.layer_specs) == LLAMA.num_layers
    te_spec = object()
    monkeypatch.setattr(layer_spec, "get_gpt_layer_with_transformer_engine_spec", lambda **arguments: te_spec)
    assert layer_spec.build_block_spec(config, "te") is te_spec


CHOICES = {
    "num_moe_experts": ("num_experts", 5),
    "moe_grouped_gemm": ("moe_grouped_gemm", True),
    "qk_layernorm": ("qk_layernorm", True),
    "multi_latent_attention": ("multi_latent_attention", True),
    "qk_l2_norm": ("qk_l2_norm", True),
    "use_transformer_engine_op_fuser": ("use_te_op_fuser", True),
    "use_kitchen": ("use_kitchen", True),
    "use_te_activation_func": ("use_te_activation_func", True),
    "use_kitchen_attention": ("use_kitchen_attention", True),
    "kitchen_attention_backend": ("kitchen_attention_backend", "fa"),
    "mla_down_proj_fusion": ("mla_down_proj_fusion", True),
    "use_grouped_gemm_for_dense_mlp": ("use_grouped_gemm_for_dense_mlp", True),
}


@pytest.mark.parametrize("field", CHOICES)
def test_every_choice_of_a_te_layer_reaches_megatron(monkeypatch, field: str) -> None:
    """One field set at a time, so that no two can be swapped."""
    from megatron_hammer.model import layer_spec

    name, value = CHOICES[field]
    config = copy.copy(build_whole_model(read_arguments(LLAMA)).config)
    monkeypatch.setattr(layer_spec, "get_gpt_layer_with_transformer_engine_spec", lambda **arguments: arguments)
    before = layer_spec.build_layer_spec(config, "te")
    setattr(config, field, value)
    after = layer_spec.build_layer_spec(config, "te")
    assert {key: after[key] for key in after if after[key] != before[key]} == {name: value}


def test_no_argument_of_megatrons_te_layer_is_forgotten() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    parameters = set(inspect.signature(get_gpt_layer_with_transformer_engine_spec).parameters)
    assert parameters - {"fp8"} == {name for name, _ in CHOICES.values()}  # fp8 is deprecated and unused
