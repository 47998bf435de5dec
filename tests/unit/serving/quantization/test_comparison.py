"""The table of a quantization: against transformers, which computes the same texts with the weights put in by hand."""

import json

import numpy as np
import pytest
import torch
import transformers

from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
from megatron_hammer.errors import ConfigError
from megatron_hammer.evaluation.perplexity.domains import DomainOptions, read_domain
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions
from megatron_hammer.serving.quantization.comparison import (
    build_rows,
    compare_models,
    describe,
    draw_places,
    format_markdown,
)
from megatron_hammer.serving.quantization.packed_weights import iterate_plain_weights
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.messages import raises_problem
from tests.helpers.packed_folders import pack_folder, write_small_source
from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_small_source(folder / "source")
    pack_folder(folder / "source", folder / "gptq", "gptq", 4)
    write_jsonl(folder / "toy.jsonl", TOY_TEXTS)
    return folder


@pytest.fixture(scope="module")
def domains(folder):
    return [read_domain("toy", str(folder / "toy.jsonl"), DomainOptions())]


@pytest.fixture(scope="module")
def compared(folder, domains):
    compared = compare_models([folder / "source", folder / "gptq"], domains, options=ScorerOptions())
    # The folder of plain weights is gone.
    assert {path.name for path in folder.iterdir()} == {"source", "gptq", "toy.jsonl"}
    return compared


def compute_nats_and_choices(model, texts) -> tuple[float, list[int]]:
    nats, choices = 0.0, []
    for ids in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        choices += logits.argmax(-1).tolist()
    return nats, choices


def test_the_figures_are_those_of_transformers(folder, compared) -> None:
    encoder = load_encoder(folder / "source")
    texts = [[encoder.bos_id, *encoder.encode(text).tolist()] for text in TOY_TEXTS]
    num_bytes = sum(len(text.encode()) for text in TOY_TEXTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    nats, choices = compute_nats_and_choices(model, texts)
    source, quantized = (one.domains[0] for one in compared)
    assert source.estimates.bits_per_byte.value == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)
    assert source.agreement == 1
    model.load_state_dict({name: tensor.half().float() for name, tensor in iterate_plain_weights(folder / "gptq")})
    other_nats, other_choices = compute_nats_and_choices(model, texts)
    assert quantized.estimates.bits_per_byte.value == pytest.approx(other_nats / np.log(2) / num_bytes, rel=1e-5)
    # There are fewer tokens than places that could be drawn, so every token is one.
    assert quantized.num_places == len(choices) < 256
    agreement = float(np.mean(np.array(choices) == np.array(other_choices)))
    assert quantized.agreement == pytest.approx(agreement)
    assert 0 < agreement < 1


def test_the_table_has_a_row_per_model_and_domain(compared) -> None:
    rows = build_rows(compared)
    assert [row[:2] for row in rows] == [("source", "toy"), ("gptq", "toy")]
    assert rows[0][3] == "100.0%"
    assert float(rows[1][3].rstrip("%")) < 70  # the embedding of a toy is a large part
    assert rows[0][6] == "+0.0000"
    assert format_markdown(compared).splitlines()[2].startswith("| source | toy | ")
    assert json.dumps(describe(compared))


def test_gguf_files_are_compared_and_timed_against_the_first(folder, tmp_path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is missing; pip install megatron_hammer[gguf]")
    paths = [tmp_path / f"{file_type}.gguf" for file_type in ("f32", "q8_0")]
    for path in paths:
        options = GgufOptions(load_dir=folder / "source", save_path=path, file_type=path.stem, is_verified=False)
        export_to_gguf(options)
    # llama.cpp is asked once for each token, so that one document is enough.
    domains = [read_domain("toy", str(folder / "toy.jsonl"), DomainOptions(max_documents=1))]
    models = compare_models([folder / "source", *paths], domains, options=ScorerOptions())
    assert [model.speed is None for model in models] == [True, False, False]
    assert models[1].speed == 1
    bits = [model.domains[0].estimates.bits_per_byte.value for model in models]
    assert bits[1] == pytest.approx(bits[0], rel=1e-3)
    assert models[1].domains[0].agreement == 1
    assert models[2].size_bytes == paths[1].stat().st_size < models[1].size_bytes / 3
    assert [row[-1] for row in build_rows(models)][:2] == ["-", "1.00"]


def test_places_are_drawn_once_and_have_their_context(folder, domains) -> None:
    encoder = load_encoder(folder / "source")
    places = draw_places(encoder, domains[0], 10)
    assert places == draw_places(encoder, domains[0], 10)
    assert max(map(len, places)) == 10
    longest = draw_places(encoder, domains[0], 1000)
    expected = [[encoder.bos_id, *encoder.encode(text).tolist()] for text in TOY_TEXTS]
    assert longest == [ids[:length] for ids in expected for length in range(1, len(ids))]


def test_a_model_with_another_tokenizer_is_refused(folder, domains, tmp_path) -> None:
    other = write_small_source(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "tokenizer.model").unlink()
    with raises_problem(ConfigError, "compare", str(other / "tokenizer.json"), "evaluate_perplexity.py"):
        compare_models([folder / "source", other], domains, options=ScorerOptions())
