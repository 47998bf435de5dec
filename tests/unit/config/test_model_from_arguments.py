import pytest

from megatron_hammer.config.model_from_arguments import (
    build_layout,
    build_model,
    count_least_world_size,
    default_ffn_hidden_size,
)
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import RopeScaling
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.parsed_flags import TINY, parse, plan


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_exactly(name: str) -> None:
    preset = PRESETS[name]
    namespace = parse("--preset", name, "--dry-run").namespace
    model = build_model(namespace, name=name)
    assert count_parameters(model) == preset.num_parameters
    for field in ("num_layers", "head_dim", "num_query_groups", "activation", "normalization", "moe"):
        assert getattr(model, field) == getattr(preset.model, field), field
    assert build_layout(namespace) == preset.recipe.build_layout()


def test_overrides_are_counted() -> None:
    plain = build_model(parse(*TINY).namespace)
    deeper = build_model(parse(*TINY, "--num-layers", "6").namespace)
    assert count_parameters(deeper) == count_parameters(plain) + 2 * (count_parameters(plain) - _ends(plain)) // 4
    wide_heads = build_model(parse(*TINY, "--kv-channels", "24").namespace)
    attention_per_layer = 256 * 8 * (16 + 2 * 2 + 16)  # 8 channels more in each head of q, k, v and the projection
    assert count_parameters(wide_heads) == count_parameters(plain) + 4 * attention_per_layer


def test_norms_of_queries_and_keys_and_the_scaled_rope_are_read() -> None:
    plain = build_model(parse(*TINY).namespace)
    model = build_model(parse(*TINY, "--qk-layernorm", "--use-rope-scaling", "--rope-scaling-factor", "32").namespace)
    assert (model.has_qk_norm, model.rope_scaling) == (True, RopeScaling(factor=32.0))
    assert (plain.has_qk_norm, plain.rope_scaling) == (False, None)
    assert count_parameters(model) == count_parameters(plain) + 4 * 2 * 16  # two norms of a head's width a layer


def test_gelu_is_the_exact_one_without_megatrons_fusion() -> None:
    assert build_model(parse("--preset", "gpt2-124m").namespace).activation == "gelu_tanh"
    assert build_model(parse("--preset", "gpt2-124m", "--no-bias-gelu-fusion").namespace).activation == "gelu_erf"


def _ends(model) -> int:
    return 2 * model.vocab_size * model.hidden_size + model.hidden_size


def test_qkv_bias_and_legacy_rotary_flag() -> None:
    biased = build_model(parse(*TINY, "--add-qkv-bias").namespace)
    assert count_parameters(biased) == count_parameters(build_model(parse(*TINY).namespace)) + 4 * 16 * (16 + 2 * 2)
    rotary = build_model(parse("--preset", "gpt2-124m", "--use-rotary-position-embeddings").namespace)
    assert count_parameters(rotary) == PRESETS["gpt2-124m"].num_parameters - 1024 * 768


@pytest.mark.parametrize("is_swiglu", [True, False])
def test_ffn_default_is_megatrons(is_swiglu: bool) -> None:
    from megatron_hammer.config.megatron_checks import build_trial_config

    flags = "--num-layers 2 --hidden-size 200 --num-attention-heads 4 --vocab-size 500 --seq-length 32 --mock-data "
    flags += "--max-position-embeddings 32 --micro-batch-size 1 --train-iters 5 --lr 1e-3"
    namespace = parse(*flags.split(), *(["--swiglu"] if is_swiglu else [])).namespace
    trial, _ = build_trial_config(namespace)
    assert trial.ffn_hidden_size == default_ffn_hidden_size(200, is_swiglu) == build_model(namespace).ffn_hidden_size
    assert count_parameters(build_model(namespace)) > 0


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4", 8),
        ("--expert-model-parallel-size 4", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", 2),
        ("--context-parallel-size 2 --expert-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 0", 1),
    ],
)
def test_least_world(flags: str, ranks: int) -> None:
    namespace = parse("--preset", "hammer-tiny-moe", "--dry-run", *flags.split()).namespace
    assert count_least_world_size(namespace) == ranks
    assert namespace.world_size == ranks


def test_world_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--preset", "llama2-70b", "--dry-run").namespace.world_size == 32
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert parse("--preset", "llama2-70b", "--dry-run").namespace.world_size == 64
    assert parse("--preset", "llama2-70b", *plan(128)).namespace.world_size == 128


def test_chunks_from_either_flag() -> None:
    stages = ("--preset", "llama3-70b", "--dry-run")
    assert build_layout(parse(*stages).namespace).virtual_pipeline_model_parallel_size == 5
    tiny = (*TINY, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
    assert build_layout(parse(*tiny).namespace).virtual_pipeline_model_parallel_size == 2
