"""Convention A is Megatron-LM's own arithmetic, to the last operation."""

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hammer.checkpoint.hugging_face.studied_families.catalogue import read_studied_model
from megatron_hammer.model.accounting import count_flops_per_token, padded_vocab_size
from megatron_hammer.model.shape import ModelShape, SlidingWindow
from megatron_hammer.presets.catalogue import PRESETS


def count_by_megatron(model: ModelShape, seq_length: int, batch_size: int, vocab_rows: int) -> float:
    from megatron.training.training import num_floating_point_operations

    moe, latent = model.moe, model.latent_attention
    arguments = SimpleNamespace(
        **({} if latent is None else dataclasses.asdict(latent)),
        seq_length=seq_length,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups < model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        swiglu=model.is_gated,  # --quick-geglu, which is GPT-OSS's gate, counts as no gate in 0.19.2
        padded_vocab_size=vocab_rows,
        num_experts=moe.num_experts if moe else None,
        moe_router_topk=moe.router_topk if moe else None,
        moe_ffn_hidden_size=moe.ffn_hidden_size if moe else None,
        moe_shared_expert_intermediate_size=moe.shared_expert_intermediate_size if moe else None,
        moe_layer_freq=[int(model.is_mixture(layer)) for layer in range(model.num_layers)] if moe else 1,
        moe_latent_size=None,
        mtp_num_layers=model.num_mtp_layers or None,
        multi_latent_attention=latent is not None,
        attention_output_gate=False,
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
    )
    return num_floating_point_operations(arguments, batch_size)


@pytest.mark.parametrize("name", PRESETS)
def test_convention_a_is_what_megatron_logs(name):
    model, seq_length, batch_size = PRESETS[name].model, PRESETS[name].recipe.seq_length, 3
    rows = padded_vocab_size(model.vocab_size, tensor_model_parallel_size=2)
    ours = count_flops_per_token(model, seq_length, "A", vocab_size=rows)
    assert batch_size * seq_length * ours == count_by_megatron(model, seq_length, batch_size, rows)


def test_dense_layers_among_mixtures_are_counted_by_their_own_width():
    model = PRESETS["tiny-llm-zh-moe"].model
    mixed = dataclasses.replace(model, moe=dataclasses.replace(model.moe, dense_layers=(0, 3)))
    ours = count_flops_per_token(mixed, 512, "A")
    assert 512 * ours == count_by_megatron(mixed, 512, 1, mixed.vocab_size)
    assert ours != count_flops_per_token(model, 512, "A")


def test_norms_of_queries_and_keys_are_not_counted_and_wide_heads_are():
    model = dataclasses.replace(PRESETS["hammer-1b4"].model, kv_channels=96, has_qk_norm=True)
    assert 2048 * count_flops_per_token(model, 2048, "A") == count_by_megatron(model, 2048, 1, model.vocab_size)
    assert count_flops_per_token(model, 2048) > count_flops_per_token(PRESETS["hammer-1b4"].model, 2048)


PUBLISHED = Path(__file__).parent / "published_configs"


@pytest.mark.parametrize("name", [path.stem for path in sorted(PUBLISHED.glob("*.json"))])
def test_published_mixtures_are_counted_as_megatron_counts_them(name):
    """Multi-latent attention, shared experts, first and interleaved dense layers, layers for further tokens."""
    model = read_studied_model(PUBLISHED / f"{name}.json")
    assert 4096 * count_flops_per_token(model, 4096, "A") == count_by_megatron(model, 4096, 1, model.vocab_size)


def test_latent_attention_without_a_query_rank_is_counted_as_megatron_counts_it():
    model = read_studied_model(PUBLISHED / "deepseek_v3.json")
    latent = dataclasses.replace(model.latent_attention, q_lora_rank=None, v_head_dim=96)
    plain = dataclasses.replace(model, latent_attention=latent, num_mtp_layers=2)
    assert 4096 * count_flops_per_token(plain, 4096, "A") == count_by_megatron(plain, 4096, 1, plain.vocab_size)


def test_a_window_counts_as_full_attention_as_in_what_megatron_logs():
    window = SlidingWindow(num_tokens=128, layers=(0, 2))
    model = dataclasses.replace(PRESETS["hammer-1b4"].model, sliding_window=window)
    from megatron.training.training import num_floating_point_operations

    assert 2048 * count_flops_per_token(model, 2048) == count_by_megatron(model, 2048, 1, model.vocab_size)
    assert "window" not in inspect.getsource(num_floating_point_operations)  # else it has to be counted here too


def test_twin_another_convention_is_noticed():
    model = PRESETS["hammer-1b4"].model
    for convention in ("B", "C", "D"):
        ours = count_flops_per_token(model, 2048, convention)
        assert 2048 * ours != count_by_megatron(model, 2048, 1, model.vocab_size)
