"""Filling a model's parameters from a Hugging Face folder, on one rank; other layouts: test_load_hf_runs.py."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_hammer.checkpoint.convert.fill_model import MasterWeights, fill_chunks, require_every_element
from megatron_hammer.checkpoint.hugging_face.config_json import build_config
from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.folder import HfFolder, open_hf_folder
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, MoeShape
from tests.helpers.messages import assert_problems
from tests.helpers.toy_model import GPT2, LLAMA, MOE
from tests.helpers.whole_model import build_whole_model, checkpoint_parameters, read_arguments, single_rank

BIASED_MOE = dataclasses.replace(MOE, has_qkv_bias=True)
BIASED_ROUTER = dataclasses.replace(
    LLAMA,
    moe=MoeShape(
        num_experts=6,
        router_topk=2,
        ffn_hidden_size=12,
        shared_expert_intermediate_size=24,
        is_topk_renormalized=True,
        aux_loss_coeff=0.0,
        dense_layers=(0,),
        score_function="sigmoid",
        has_expert_bias=True,
    ),
)
TIED = dataclasses.replace(LLAMA, has_tied_embeddings=True, has_qk_norm=True)
EMBEDDING = "model.embed_tokens.weight"
ROWS, HIDDEN = LLAMA.vocab_size, LLAMA.hidden_size


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def write_folder(folder: Path, model: ModelShape, *, dtype: torch.dtype = torch.float32, **changes: Any) -> HfFolder:
    """Random weights; changes: tensors that replace some, None to leave one out."""
    architecture = read_saved_model(read_arguments(model))
    family = select_family(architecture)
    generator = torch.Generator().manual_seed(11)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for pair in expand(family, architecture)
        for name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)
    }
    tensors |= changes
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = build_config(
        family, architecture, Dropout(attention=0.0, hidden=0.0), dtype="float32", bos_id=None, eos_id=None
    )
    (folder / "config.json").write_text(json.dumps(config))
    return open_hf_folder(folder)


@pytest.mark.parametrize(
    "model",
    [LLAMA, TIED, BIASED_MOE, BIASED_ROUTER, GPT2],
    ids=["llama", "tied-qk-norm", "moe", "biased-router", "gpt2"],
)
def test_every_parameter_is_what_the_mapping_makes_of_the_folder(model: ModelShape, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", model)
    built = build_whole_model(read_arguments(model))
    num_held = fill_chunks([built], source)
    require_every_element(source, num_held.tolist())
    parameters = checkpoint_parameters(built)
    assert parameters.keys() == {pair.megatron_name for pair in source.pairs}
    for pair in source.pairs:
        expected, parameter = source.read_pair(pair), parameters[pair.megatron_name]
        assert torch.equal(parameter[: len(expected)], expected), pair.megatron_name
        assert not parameter[len(expected) :].any(), "padding rows"
    assert parameters["embedding.word_embeddings.weight"].shape[0] == 128


def test_a_swapped_layer_would_show(tmp_path: Path) -> None:
    """The twin: every tensor of every layer has values of its own."""
    source = write_folder(tmp_path / "hf", LLAMA)
    built = build_whole_model(read_arguments(LLAMA))
    fill_chunks([built], source)
    first, second = (layer.mlp.linear_fc1.weight for layer in built.decoder.layers[:2])
    assert not torch.equal(first, second)
    gate, up = first.chunk(2)
    assert not torch.equal(gate, up)


def test_fp32_copies_take_the_digits_that_bf16_drops(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", LLAMA)
    built = build_whole_model(read_arguments(LLAMA)).bfloat16()
    weight = built.decoder.layers[1].mlp.linear_fc1.weight
    masters = {weight: MasterWeights(tensor=torch.zeros(HIDDEN * 7), start=HIDDEN * 3)}
    fill_chunks([built], source, find_master=masters.get)
    pair = next(pair for pair in source.pairs if pair.megatron_name == "decoder.layers.1.mlp.linear_fc1.weight")
    expected = source.read_pair(pair)
    assert torch.equal(masters[weight].tensor, expected[3:10].flatten())
    assert torch.equal(weight, expected.bfloat16())
    assert not torch.equal(weight.float(), expected)


def test_an_expert_bias_stays_fp32_in_a_16_bit_model(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", BIASED_ROUTER)
    built = build_whole_model(read_arguments(BIASED_ROUTER)).bfloat16()
    router = built.decoder.layers[1].mlp.router
    assert router.expert_bias.dtype == torch.bfloat16  # what Megatron's wrapper of 16-bit models makes of it
    require_every_element(source, fill_chunks([built], source).tolist())
    assert torch.equal(router.expert_bias, source.read("model.layers.1.mlp.gate.e_score_correction_bias"))


def test_values_that_are_not_finite_are_named_all_at_once(tmp_path: Path) -> None:
    embedding, norm = torch.zeros(ROWS, HIDDEN), torch.ones(HIDDEN)
    embedding[7, 3], norm[5] = math.nan, math.inf
    source = write_folder(tmp_path / "hf", LLAMA, **{EMBEDDING: embedding, "model.norm.weight": norm})
    with pytest.raises(ConversionError) as caught:
        fill_chunks([build_whole_model(read_arguments(LLAMA))], source)
    assert_problems(
        caught.value.problems,
        (f"{tmp_path}/hf: {EMBEDDING}:", "finite", "got NaN or infinity"),
        (f"{tmp_path}/hf: model.norm.weight:", "finite", "got NaN or infinity"),
    )


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", LLAMA, **{"model.norm.weight": torch.full((HIDDEN,), 70_000.0)})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight: must fit into fp16, got values up to 7e\+04\."):
        fill_chunks([build_whole_model(read_arguments(LLAMA)).half()], source)


def test_a_model_of_another_shape_is_not_half_filled(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", LLAMA)
    other = dataclasses.replace(LLAMA, ffn_hidden_size=18, num_layers=4, has_qkv_bias=True)
    with pytest.raises(ConversionError) as caught:
        fill_chunks([build_whole_model(read_arguments(other))], source)
    problems = "\n".join(caught.value.problems)
    assert "model.layers.0.mlp.down_proj.weight: must be filled whole, got 0 of 432 elements. Check" in problems
    fact = "must be one tensor of the folder's architecture, got none. Check config.json."
    assert f"decoder.layers.self_attention.linear_qkv.bias: {fact}" in problems
    assert f"decoder.layers.mlp.linear_fc1.weight: {fact}" in problems  # of the fourth layer


def test_tensors_that_no_rank_holds_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", LLAMA)
    num_held = fill_chunks([build_whole_model(read_arguments(LLAMA))], source)
    num_held[0] -= HIDDEN
    with pytest.raises(ConversionError) as caught:
        require_every_element(source, num_held.tolist())
    assert_problems(
        caught.value.problems,
        (f"{tmp_path}/hf:", f"{EMBEDDING} must go into the model", "got 1,248 of 1,272 elements"),
    )
