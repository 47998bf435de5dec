"""Models known by name have the parameters that their owners publish."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.published.row_model import UnpredictableError, build_row_model, load_known_models
from megatron_hammer.scaling.published.run_table import RunRow


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("llama2-7b", 6_738_415_616),  # the sums of the published checkpoints
        ("Llama2-13b", 13_015_864_320),
        ("LLAMA2-70B", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("Meta-Llama-3.1-405B", 405_853_388_800),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("Mistral-7B", 7_241_732_096),
    ],
)
def test_exact_counts(name: str, num_parameters: int) -> None:
    model, _ = build_row_model(RunRow(row_number=2, model=name))
    assert count_parameters(model) == num_parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("GPT3-175B", 175), ("Nemotron4-15B", 15.6), ("nemotron-4-340b", 341), ("Nemotron-340B", 341), ("MPT-7b", 6.66),
        ("MPT-30b", 29.98), ("InternLM-7B", 7.32), ("GPT-5B", 5), ("GPT3-20B", 20), ("Nemotron-8B", 8.5),
        ("Nemotron-22B", 21.3), ("SmolLM3-3B", 3.08), ("OLMo2-32B", 32.2), ("StarCoder2-3B", 3.03),
        ("GPT2-1558M", 1.558), ("LLaMA-65B", 65.3),
        ("BLOOM-176B", 176.2), ("GPT-NeoX-20B", 20.6), ("OPT-175B", 175), ("GPT-39.1B", 39.1), ("GPT-1008B", 1008),
        ("Llama-1.34B", 1.34), ("Llama-80.0B", 80.0), ("GPT-22B", 22),
    ],
)  # fmt: skip
def test_counts_in_billions(name: str, billions: float) -> None:
    model, _ = build_row_model(RunRow(row_number=2, model=name))
    assert count_parameters(model) / 1e9 == pytest.approx(billions, rel=0.04)


def test_every_known_model_names_its_source_and_divides() -> None:
    listed = load_known_models()
    assert len(listed.model) > 60
    assert all(family.source for family in listed.family)
    for known in listed.model:
        assert known.source
        assert known.hidden is not None
        assert known.heads is not None
        assert known.hidden % known.heads == 0
        assert known.heads % (known.kv_heads or known.heads) == 0


def test_the_row_goes_before_the_name() -> None:
    row = RunRow(row_number=2, model="llama3-8b", layers=8, kv_heads=4, vocab=1000)
    model, assumptions = build_row_model(row)
    assert (model.num_layers, model.num_query_groups, model.vocab_size, model.hidden_size) == (8, 4, 1000, 4096)
    assert not any(text.startswith("kv_heads") for text in assumptions)


def test_a_preset_of_other_sizes_is_not_taken() -> None:
    same, assumptions = build_row_model(RunRow(row_number=2, model="hammer-1b4", layers=22, vocab=105_789))
    assert same.name == "hammer-1b4"
    assert assumptions[0].startswith("model hammer-1b4: the preset of this name")
    other, _ = build_row_model(
        RunRow(row_number=2, model="hammer-1b4", layers=22, hidden=2048, heads=32, ffn=5632, vocab=32_000)
    )
    assert (other.vocab_size, other.num_query_groups) == (32_000, 32)


def test_a_name_does_not_lend_its_width_to_another() -> None:
    model, assumptions = build_row_model(RunRow(row_number=2, model="GPT-1.7B", layers=24, hidden=2048))
    assert (model.num_attention_heads, model.ffn_hidden_size) == (16, 8192)
    assert "heads 16: blank, a head of 128" in assumptions


@pytest.mark.parametrize("name", ["LLaMA3-8B", "llama-3_8b", "Llama 3 8B"])
def test_a_preset_is_found_in_every_spelling(name: str) -> None:
    model, assumptions = build_row_model(RunRow(row_number=2, model=name))
    assert model is PRESETS["llama3-8b"].model
    assert assumptions[0].startswith("model llama3-8b: the preset")


def test_another_model_of_the_same_width_lends_no_heads() -> None:
    """MegaScale's 175B and 530B (arXiv 2402.15627, table 1) have 128 and 160 heads; GPT-3 and MT-NLG 96 and 128."""
    for name, layers, hidden, heads in (("GPT-175B", 96, 12288, 128), ("MT-NLG-530B", 105, 20480, 160)):
        row = RunRow(row_number=2, model=name, layers=layers, hidden=hidden, heads=heads, vocab=64_000)
        model, assumptions = build_row_model(row)
        assert model.num_query_groups == heads
        assert f"kv_heads {heads}: blank, multi-head attention" in assumptions
    published, _ = build_row_model(RunRow(row_number=2, model="GPT-175B", heads=96))
    assert published.num_query_groups == 96


def test_the_stated_size_says_whether_embeddings_are_tied() -> None:
    """Megatron-LM's README prints 7.1 B and 177 B for these sizes, which only an output layer of its own gives."""
    for size, layers, hidden in ((7.1, 30, 4096), (177, 96, 12288)):
        row = RunRow(row_number=2, model=f"GPT-{size}B", params_b=size, layers=layers, hidden=hidden, vocab=131_072)
        model, assumptions = build_row_model(row)
        assert not model.has_tied_embeddings
        assert f"untied embeddings: params_B {size:g}" in assumptions
        assert build_row_model(replace(row, params_b=None))[0].has_tied_embeddings
    tied = RunRow(row_number=2, model="GPT-1B", params_b=1.16, layers=24, hidden=1920, heads=15)
    assert build_row_model(tied)[0].has_tied_embeddings, "the size is that of tied ones"
    known = RunRow(row_number=2, model="Llama-3-8B", params_b=7.5)
    assert not build_row_model(known)[0].has_tied_embeddings, "published, whatever the size says"


def test_a_mixture_whose_row_has_no_experts_is_not_taken_for_a_small_dense_model() -> None:
    """Under whatever name: the sizes of GPT-OSS-120B without its experts are those of a model of 3 billion."""
    sizes = {"layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8, "ffn": 2880, "vocab": 201_088, "head_dim": 64}
    row = RunRow(row_number=2, model="our-large-one", params_b=116.8, **sizes)
    with pytest.raises(UnpredictableError, match=r"3\.\d+ B parameters as built, the row says 116.8 B"):
        build_row_model(row)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"heads": 32, "kv_heads": 6}, "its 6 kv heads do not divide its 32 heads"),
        ({"heads": 24, "kv_heads": 24}, "its 24 heads do not divide hidden 4000"),
        ({}, "heads is blank and hidden 4000 is no multiple of 128"),
        ({"heads": 40, "model": "Yi-x"}, "ffn is blank and the model is not known by its name"),
        ({"heads": 40, "ffn": 9000, "model": "Yi-x"}, "vocab is blank and the model is not known by its name"),
    ],
)
def test_models_that_no_rule_fills_are_refused(cells: dict[str, int | str], reason: str) -> None:
    row = RunRow(**({"row_number": 2, "model": "X", "layers": 4, "hidden": 4000} | cells))  # type: ignore[arg-type]
    with pytest.raises(UnpredictableError, match=reason):
        build_row_model(row)


@pytest.mark.parametrize(
    "name",
    [
        "Mixtral-8x7B",
        "qwen3-235b-a22b",
        "qwen3_235ba22b",
        "Qwen1.5-MoE-A2.7B",
        "a3b",
        "DeepSeek-V3",
        "grok-1",
        "GPT-OSS-120B",
    ],
)
def test_models_with_experts_are_refused(name: str) -> None:
    with pytest.raises(UnpredictableError, match="experts"):
        build_row_model(RunRow(row_number=2, model=name))


@pytest.mark.parametrize("name", ["llama7b", "gemma2b", "Nova1.5B"])
def test_dense_names_that_end_in_a_and_a_size_are_not_taken_for_experts(name: str) -> None:
    row = RunRow(row_number=2, model=name, layers=4, hidden=512, heads=8, ffn=1536, vocab=3200)
    model, _ = build_row_model(row)
    assert (model.moe, model.num_layers, model.vocab_size) == (None, 4, 3200)


EXPERT_ROW = RunRow(
    row_number=2, model="qwen3-a3b of a row", params_b=30.5, layers=48, hidden=2048, heads=32, kv_heads=4,
    vocab=151_936, head_dim=128, experts=128, topk=8, moe_ffn=768, shared_ffn=0, dense_layers=0,
)  # fmt: skip


def test_the_columns_of_experts_build_the_published_model() -> None:
    model, _ = build_row_model(EXPERT_ROW)
    assert model.moe is not None
    assert (model.moe.num_experts, model.moe.router_topk, model.moe.ffn_hidden_size) == (128, 8, 768)
    # 30,532,122,624 parameters of the published checkpoint, without the norms of query and key (2 x 128 per layer)
    assert count_parameters(model) == 30_532_122_624 - 48 * 2 * 128


def test_active_parameters_may_be_stated_without_the_row_of_the_embedding() -> None:
    counted, embedding = 3.353, 2048 * 151_936 / 1e9
    for stated in (counted, counted - embedding):
        build_row_model(replace(EXPERT_ROW, params_active_b=round(stated, 2)))


def test_dense_layers_are_the_first_or_every_second() -> None:
    deepseek, _ = build_row_model(replace(EXPERT_ROW, params_b=None, dense_layers=3, ffn=6144))
    maverick, _ = build_row_model(replace(EXPERT_ROW, params_b=None, dense_layers=24, ffn=6144))
    assert deepseek.moe is not None
    assert deepseek.moe.dense_layers == (0, 1, 2)
    assert maverick.moe is not None
    assert maverick.moe.dense_layers == tuple(range(0, 48, 2))


def test_a_window_of_alternate_layers() -> None:
    model, _ = build_row_model(replace(EXPERT_ROW, notes="alternate layers use 128-token sliding-window attention"))
    assert model.sliding_window is not None
    assert (model.sliding_window.num_tokens, model.sliding_window.layers[:3]) == (128, (0, 2, 4))


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"topk": None}, "its model has experts, and topk blank"),
        ({"params_b": 31.5}, "its model has 30.53 B parameters as built, the row says 31.5 B"),
        ({"params_active_b": 3.6}, "its model has 3.353 B active parameters as built, the row says 3.6 B"),
        ({"params_active_b": 2.9}, "its model has 3.353 B active parameters as built, the row says 2.9 B"),
        ({"dense_layers": 3}, "ffn is blank, the width of its dense layers"),
        ({"dense_layers": 48, "ffn": 6144}, "all of its 48 layers are dense"),
        ({"notes": "HYBRID-MAMBA: 23 Mamba2 + 23 MoE"}, "hybrid of Mamba"),
        ({"notes": "SPARSE ATTENTION (CSA)"}, "sparse attention"),
        ({"attention": "mla", "kv_lora": 512}, "its attention is latent, and qk_head and v_head and rope_head blank"),
        ({"notes": "footnote: known GPT-OSS regression in this release"}, "names a regression"),
    ],
)
def test_rows_with_experts_that_are_refused(cells: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnpredictableError, match=reason):
        build_row_model(replace(EXPERT_ROW, **cells))


def test_latent_attention_and_layers_for_further_tokens() -> None:
    """DeepSeek-V3's 671 B parameters are those of its layers without the one for a further token."""
    row = RunRow(
        row_number=2, model="deepseek-v3", params_b=671, layers=61, hidden=7168, heads=128, kv_heads=128, ffn=18_432,
        vocab=129_280, experts=256, topk=8, moe_ffn=2048, shared_ffn=2048, dense_layers=3, attention="mla",
        q_lora=1536, kv_lora=512, qk_head=128, v_head=128, rope_head=64, mtp_layers=1,
    )  # fmt: skip
    model, _ = build_row_model(row)
    assert model.latent_attention is not None
    assert (model.latent_attention.query_dim, model.num_mtp_layers) == (192, 1)
    assert count_parameters(replace(model, num_mtp_layers=0)) / 1e9 == pytest.approx(671.0, rel=1e-3)


def test_models_with_sinks_have_their_biases_and_activation() -> None:
    model, _ = build_row_model(replace(EXPERT_ROW, model="gpt-oss-120b", params_b=None))
    assert (model.has_attention_sinks, model.has_linear_bias, model.activation) == (True, True, "clamped_swiglu")


def test_the_chunks_of_llama4() -> None:
    model, _ = build_row_model(replace(EXPERT_ROW, notes="chunked local attention in 3 of 4 layers (public config)"))
    assert model.sliding_window is not None
    assert model.sliding_window.is_chunked
    assert model.sliding_window.layers[:4] == (0, 1, 2, 4)
