import argparse
import dataclasses

import pytest

from megatron_hammer.config.model_arguments import build_model_arguments, default_ffn_hidden_size, read_model
from megatron_hammer.config.untrained_models import UNTRAINED
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import ModelShape, MoeShape, RopeScaling, SlidingWindow, YarnScaling
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.parsed_flags import TINY, parse
from tests.helpers.toy_model import GPT2, GPT2_ARGUMENTS, LLAMA, MOE, MOE_ARGUMENTS, toy_arguments


def read_arguments(model: ModelShape) -> argparse.Namespace:
    """What a run of the model has in Megatron's namespace, whose own defaults stand for what is not set."""
    defaults = {"bias_gelu_fusion": True, "num_experts": None}
    return argparse.Namespace(**defaults | build_model_arguments(model))


@pytest.mark.parametrize(
    ("changes", "model"),
    [({}, LLAMA), (GPT2_ARGUMENTS, GPT2), (MOE_ARGUMENTS, MOE)],
    ids=["llama", "gpt2", "mixture of experts"],
)
def test_saved_arguments_spelt_by_hand_are_the_shape_spelt_by_hand(changes: dict, model: ModelShape) -> None:
    assert read_model(toy_arguments(**changes), name="toy") == model


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_exactly(name: str) -> None:
    preset = PRESETS[name]
    model = read_model(parse("--preset", name, "--dry-run").namespace, name=name)
    assert (model, model.name) == (preset.model, name)
    assert count_parameters(model) == preset.num_parameters


def test_every_field_is_translated_and_a_change_of_one_is_noticed() -> None:
    """In both directions: a field that one direction leaves out would come back unchanged."""
    moe = MoeShape(
        num_experts=5,
        router_topk=3,
        ffn_hidden_size=12,
        shared_expert_intermediate_size=9,
        has_shared_expert_gate=True,
        is_topk_renormalized=True,
        aux_loss_coeff=0.03,
        dense_layers=(0, 2),
    )
    changes = {
        "num_layers": 5,
        "hidden_size": 36,
        "ffn_hidden_size": 28,
        "num_attention_heads": 4,
        "num_query_groups": 3,
        "vocab_size": 61,
        "max_position_embeddings": 128,
        "normalization": "LayerNorm",
        "norm_epsilon": 3e-6,
        "activation": "gelu_erf",
        "position_embedding_type": "learned_absolute",
        "rotary_base": 500_000,
        "has_linear_bias": True,
        "has_qkv_bias": True,
        "has_tied_embeddings": True,
        "has_embedding_norm": True,
        "init_method_std": 0.01,
        "moe": moe,
        "kv_channels": 10,
        "has_qk_norm": True,
        "rope_scaling": RopeScaling(factor=32.0),
        "rotary_seq_len_interpolation_factor": 4,
        "sliding_window": SlidingWindow(num_tokens=6, layers=(1,)),
        "rotary_percent": 0.5,
        "layers_without_rope": (0, 2),
        "embedding_multiplier": 12.0,
        "attention_scale": 0.7,
        "residual_multiplier": 0.22,
        "logits_multiplier": 1 / 1.3,
    }
    described = changes.keys() | {"name", "source"} | {name for name in UNTRAINED if "." not in name}
    assert described == {field.name for field in dataclasses.fields(ModelShape)}
    for name, value in changes.items():
        linear = {"has_qkv_bias": True} if name == "has_linear_bias" else {}
        changed = dataclasses.replace(LLAMA, **{name: value}, **linear)
        assert changed != LLAMA
        assert read_model(read_arguments(changed)) == changed, name
    yarn = YarnScaling(
        factor=6.0,
        original_max_position_embeddings=40,
        beta_fast=7.0,
        beta_slow=0.5,
        mscale=0.7,
        mscale_all_dim=0.6,
        has_whole_bounds=False,
    )
    defaults = YarnScaling(factor=1.0, original_max_position_embeddings=4096)
    assert not any(getattr(yarn, field.name) == getattr(defaults, field.name) for field in dataclasses.fields(yarn))
    stretched = dataclasses.replace(LLAMA, rope_scaling=yarn)
    assert read_model(read_arguments(stretched)) == stretched
    plain = read_arguments(LLAMA)
    plain.position_embedding_type = "yarn"
    assert read_model(plain).rope_scaling == defaults


def test_every_field_of_the_experts_is_translated() -> None:
    sigmoid = MoeShape(
        num_experts=8, router_topk=4, ffn_hidden_size=12, is_topk_renormalized=True, score_function="sigmoid"
    )
    changes = {
        "num_experts": 6,
        "router_topk": 2,
        "ffn_hidden_size": 16,
        "shared_expert_intermediate_size": 9,
        "aux_loss_coeff": 0.03,
        "dense_layers": (1,),
        "score_function": "sqrtsoftplus",
        "has_expert_bias": True,
        "topk_scaling_factor": 2.5,
    }
    groups = {"num_groups": 4, "group_topk": 2}
    softmax = {"is_topk_renormalized": False, "has_shared_expert_gate": True}  # beside what they need
    described = changes.keys() | groups.keys() | softmax.keys() | {"has_scaled_inputs"}
    assert described == {field.name for field in dataclasses.fields(MoeShape)}
    models = [{name: value} for name, value in changes.items()]
    models += [groups, {"is_topk_renormalized": False, "score_function": "softmax"}]
    models += [{"has_shared_expert_gate": True, "shared_expert_intermediate_size": 9}]
    for change in models:
        changed = dataclasses.replace(LLAMA, moe=dataclasses.replace(sigmoid, **change))
        assert read_model(read_arguments(changed)) == changed, change


def test_equal_routers_are_equal_shapes() -> None:
    """Megatron ignores these, or takes them for what it does without."""
    base = toy_arguments(**MOE_ARGUMENTS | {"moe_router_score_function": "sigmoid"})
    same = {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 1.0,
        "moe_router_num_groups": 5,
        "moe_layer_freq": [1, 1, 1],
    }
    for name, value in same.items():
        assert read_model(argparse.Namespace(**vars(base) | {name: value})) == read_model(base), name
    every_second = read_model(argparse.Namespace(**vars(base) | {"moe_layer_freq": 2}))
    assert every_second.moe is not None
    assert every_second.moe.dense_layers == (1,)
    alone = read_model(argparse.Namespace(**vars(base) | {"moe_router_topk": 1}))
    assert alone.moe is not None
    assert not alone.moe.is_topk_renormalized


def test_arguments_saved_before_a_flag_existed_mean_what_megatron_did_then() -> None:
    arguments = read_arguments(LLAMA)
    for name in (
        *("embedding_norm", "qk_layernorm", "use_rope_scaling", "rotary_seq_len_interpolation_factor"),
        *("rotary_percent", "no_rope_freq", "use_mup", "residual_multiplier"),
    ):
        delattr(arguments, name)
    assert read_model(arguments) == LLAMA
    del arguments.swiglu
    with pytest.raises(AttributeError, match="swiglu"):
        read_model(arguments)


def test_a_gate_of_no_shared_expert_and_a_factor_of_one_change_nothing() -> None:
    moe = MoeShape(num_experts=5, router_topk=3, ffn_hidden_size=12)
    mixture = dataclasses.replace(LLAMA, moe=moe)
    arguments = read_arguments(mixture)
    arguments.moe_shared_expert_gate, arguments.rotary_seq_len_interpolation_factor = True, 1
    assert read_model(arguments) == mixture


@pytest.mark.parametrize(("flag", "layers"), [("2", (1, 3)), ("[1,0,0,1]", (0, 3)), ("[0]*4", ()), ("4", (3,))])
def test_both_forms_of_no_rope_freq_are_the_layers_without_a_rope(flag: str, layers: tuple[int, ...]) -> None:
    model = read_model(parse(*TINY, "--no-rope-freq", flag).namespace)
    assert model.layers_without_rope == layers
    assert model.rope_share == 1 - len(layers) / 4
    assert read_model(read_arguments(model)) == model


def test_a_list_of_every_nth_layer_is_written_as_its_number() -> None:
    model = dataclasses.replace(LLAMA, num_layers=6, layers_without_rope=(2, 5))
    assert build_model_arguments(model)["no_rope_freq"] == 3
    # Megatron takes the number only where it divides the layers.
    uneven = dataclasses.replace(LLAMA, num_layers=5, layers_without_rope=(2,))
    assert build_model_arguments(uneven)["no_rope_freq"] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (1.0, 16**-1.0, 1.0)),  # Megatron's defaults: scores divided by the width of a head
        ("--mup-attn-scale-power 0.5", (1.0, None, 1.0)),
        ("--mup-base-head-dim 16", (1.0, None, 1.0)),
        ("--mup-base-hidden-size 64 --mup-base-head-dim 4", (1.0, 2 / 16, 0.25)),
        ("--mup-base-hidden-size 64 --mup-output-mult 3 --mup-embedding-mult 10", (10.0, 1 / 16, 3.0)),
    ],
)
def test_the_multipliers_of_mup_are_those_that_megatron_derives(flags: str, expected: tuple) -> None:
    from megatron_hammer.config.megatron_checks import build_trial_config

    namespace = parse(*TINY, "--use-mup", *flags.split()).namespace
    model = read_model(namespace)
    assert (model.embedding_multiplier, model.attention_scale, model.logits_multiplier) == expected
    transformer = build_trial_config(namespace)[1].transformer
    assert transformer.softmax_scale == pytest.approx(model.attention_scale or model.head_dim**-0.5, rel=1e-15)
    assert (transformer.mup_embedding_mult, transformer.mup_output_mult) == (expected[0], expected[2])
    assert read_model(read_arguments(model)) == model


@pytest.mark.parametrize("frequency", [None, 1, 2, 3, 5, [1, 0, 0, 1], [0, 0, 0, 0]], ids=str)
def test_a_window_is_in_the_layers_in_which_megatron_has_it(frequency) -> None:
    from megatron.core.transformer.utils import is_layer_window_attention

    arguments = parse(*TINY, "--window-size", "4,0").namespace
    arguments.window_attn_skip_freq = frequency
    layers = [layer for layer in range(4) if is_layer_window_attention((4, 0), frequency, layer + 1)]
    window = read_model(arguments).sliding_window
    assert (list(window.layers) if window else []) == layers
    assert window is None or window.num_tokens == 5


def test_overrides_are_counted() -> None:
    plain = read_model(parse(*TINY).namespace)
    deeper = read_model(parse(*TINY, "--num-layers", "6").namespace)
    assert count_parameters(deeper) == count_parameters(plain) + 2 * (count_parameters(plain) - _ends(plain)) // 4
    wide_heads = read_model(parse(*TINY, "--kv-channels", "24").namespace)
    attention_per_layer = 256 * 8 * (16 + 2 * 2 + 16)  # 8 channels more in each head of q, k, v and the projection
    assert count_parameters(wide_heads) == count_parameters(plain) + 4 * attention_per_layer


def test_norms_of_queries_and_keys_and_the_scaled_rope_are_read() -> None:
    plain = read_model(parse(*TINY).namespace)
    model = read_model(parse(*TINY, "--qk-layernorm", "--use-rope-scaling", "--rope-scaling-factor", "32").namespace)
    assert (model.has_qk_norm, model.rope_scaling) == (True, RopeScaling(factor=32.0))
    assert (plain.has_qk_norm, plain.rope_scaling) == (False, None)
    assert count_parameters(model) == count_parameters(plain) + 4 * 2 * 16  # two norms of a head's width a layer


def test_gelu_is_the_exact_one_without_megatrons_fusion() -> None:
    assert read_model(parse("--preset", "gpt2-124m").namespace).activation == "gelu_tanh"
    assert read_model(parse("--preset", "gpt2-124m", "--no-bias-gelu-fusion").namespace).activation == "gelu_erf"


def _ends(model) -> int:
    return 2 * model.vocab_size * model.hidden_size + model.hidden_size


def test_qkv_bias_and_legacy_rotary_flag() -> None:
    biased = read_model(parse(*TINY, "--add-qkv-bias").namespace)
    assert count_parameters(biased) == count_parameters(read_model(parse(*TINY).namespace)) + 4 * 16 * (16 + 2 * 2)
    rotary = read_model(parse("--preset", "gpt2-124m", "--use-rotary-position-embeddings").namespace)
    assert count_parameters(rotary) == PRESETS["gpt2-124m"].num_parameters - 1024 * 768


@pytest.mark.parametrize("is_swiglu", [True, False])
def test_ffn_default_is_megatrons(is_swiglu: bool) -> None:
    from megatron_hammer.config.megatron_checks import build_trial_config

    flags = "--num-layers 2 --hidden-size 200 --num-attention-heads 4 --vocab-size 500 --seq-length 32 --mock-data "
    flags += "--max-position-embeddings 32 --micro-batch-size 1 --train-iters 5 --lr 1e-3"
    namespace = parse(*flags.split(), *(["--swiglu"] if is_swiglu else [])).namespace
    trial, _ = build_trial_config(namespace)
    assert trial.ffn_hidden_size == default_ffn_hidden_size(200, is_swiglu) == read_model(namespace).ffn_hidden_size
    assert count_parameters(read_model(namespace)) > 0
