"""llama.cpp reads our GGUF files as transformers reads the folders of the same models, and refuses broken files.

Random weights: every family's greedy tokens must be equal in f32. In f16 llama.cpp rounds activations too, so that two
nearly equal logits may change places; the margin is judged then (gguf_logits_check.TOLERANCES, with what was measured).
"""

import dataclasses
import itertools
import shutil

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import quants

from megatron_hammer.checkpoint.gguf import metadata as gguf_metadata
from megatron_hammer.checkpoint.gguf import tensors as gguf_tensors
from megatron_hammer.checkpoint.gguf import to_gguf as gguf_export
from megatron_hammer.checkpoint.gguf import tokenizer as gguf_tokenizer
from megatron_hammer.checkpoint.gguf import verification as gguf_verification
from megatron_hammer.checkpoint.gguf.file_types import decode_rows, encode_rows, load_quantizer
from megatron_hammer.checkpoint.gguf.gguf_file import MAX_RELATIVE_ERROR
from megatron_hammer.checkpoint.gguf.llama_cpp import open_llama_cpp
from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, GgufReport, export_to_gguf
from megatron_hammer.checkpoint.gguf.tokenizer import read_vocabulary
from megatron_hammer.checkpoint.gguf.tokenizer_check import OVERLAP, compare_tokenizers
from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.errors import ConversionError
from tests.helpers.gguf_models import FAMILIES, SIZES, PlainTokenizer, write_gguf_source
from tests.helpers.repository import SHARED_DATA, needs_shared_data

pytest.importorskip("xllamacpp", reason="xllamacpp, the wheel of llama.cpp, is missing; pip install xllamacpp")


@pytest.fixture(autouse=True)
def short_checks(monkeypatch):
    """One thread, and a few pieces of the vocabulary: enough for toy models."""
    monkeypatch.setattr(gguf_verification, "MOST_THREADS", 1)
    monkeypatch.setattr(gguf_verification, "NUM_SAMPLED_PIECES", 40)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_gguf_source(tmp_path_factory.mktemp("llama") / "hf")


def convert(source, target, file_type: str = "f32") -> GgufReport:
    return export_to_gguf(GgufOptions(load_dir=source, save_path=target, file_type=file_type))


def greedy_row(report: GgufReport):
    return next(row for row in report.checks if row.check == "greedy tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, family):
    source = write_gguf_source(tmp_path / "hf", family)
    report = convert(source, tmp_path / "model.gguf")
    row = greedy_row(report)
    equal, of, steps = row.result.split()[:3]
    assert (row.is_passed, of) == (True, "of")
    assert equal == steps
    assert int(steps) >= 30
    assert {check.check for check in report.checks if not check.is_passed} == {"chat template"}  # it has none


def test_f16_is_within_its_tolerance(tmp_path, llama):
    report = convert(llama, tmp_path / "model.gguf", "f16")
    assert greedy_row(report).is_passed
    assert report.types == {"f16": 23, "f32": 7}


def leave_in_order(tensors):
    return [dataclasses.replace(tensor, rope_heads=None) for tensor in tensors]


def test_twin_rows_that_are_not_permuted_are_noticed(tmp_path, llama, monkeypatch):
    plan = gguf_tensors.plan_tensors
    monkeypatch.setattr(gguf_export, "plan_tensors", lambda *arguments: leave_in_order(plan(*arguments)))
    with pytest.raises(ConversionError, match=r"model\.gguf: greedy tokens must agree, got \d+ of \d+ greedy tokens"):
        convert(llama, tmp_path / "model.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_twin_a_lost_expert_bias_is_noticed(tmp_path, monkeypatch):
    source = write_gguf_source(tmp_path / "hf", "glm 4.5")
    read_stacks = gguf_export.read_stacks

    def read_without(read, moe):
        whole = read_stacks(read, moe)
        return lambda name: torch.zeros(moe.num_experts) if name.endswith("correction_bias") else whole(name)

    monkeypatch.setattr(gguf_export, "read_stacks", read_without)
    with pytest.raises(ConversionError, match=r"model\.gguf: greedy tokens must agree, got "):
        convert(source, tmp_path / "model.gguf")


def test_experts_are_quantized_and_the_router_is_not(tmp_path):
    report = convert(write_gguf_source(tmp_path / "hf", "solar open"), tmp_path / "model.gguf", "q8_0")
    # Of each of 3 layers: attention, experts and the shared one in q8_0; two norms, router and its bias in f32.
    assert report.types == {"q8_0": 2 + 3 * (4 + 3 + 3), "f32": 1 + 3 * 4}


def test_twin_lost_rope_factors_are_noticed(tmp_path, monkeypatch):
    source = write_gguf_source(tmp_path / "hf", "llama 3.1")
    monkeypatch.setattr(gguf_export, "list_extra_tensors", lambda model: [])
    with pytest.raises(ConversionError, match=r"model\.gguf: greedy tokens must agree, got "):
        convert(source, tmp_path / "model.gguf")


def test_twin_a_wrong_score_is_noticed(tmp_path, llama, monkeypatch):
    describe = gguf_metadata._describe_tokenizer

    def describe_reversed(writer, vocabulary):
        describe(writer, dataclasses.replace(vocabulary, scores=tuple(-score for score in vocabulary.scores)))

    monkeypatch.setattr(gguf_metadata, "_describe_tokenizer", describe_reversed)
    with pytest.raises(
        ConversionError,
        match=r"model\.gguf: tokenizer, samples must agree, got \d+ of .* with no known cause",
    ):
        convert(llama, tmp_path / "model.gguf")


def test_llama_cpp_refuses_a_file_that_is_not_gguf(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with (
        pytest.raises(ConversionError, match=r"broken\.gguf: llama\.cpp must load the file and answer, got: .*\. If"),
        open_llama_cpp(path, num_context_tokens=8, num_threads=1),
    ):
        pytest.fail("it was loaded")


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q5_1])
def test_the_package_quantizes_as_llama_cpp_does(kind):
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).numpy()
    encoded = quants.quantize(values, kind)
    expected = encoded.copy()
    expected.fill(0)
    load_quantizer()(int(kind), values.ctypes.data, expected.ctypes.data, 0, 6, 256, None)
    assert (encoded == expected).all()


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_k_quants_are_near_their_source(kind):
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    encoded = torch.frombuffer(bytearray(encode_rows(rows, kind)), dtype=torch.uint8).reshape(64, -1).numpy()
    error = (decode_rows(encoded, kind) - rows).square().mean().sqrt().item()
    assert MAX_RELATIVE_ERROR[kind] / 4 < error < MAX_RELATIVE_ERROR[kind] / 2


def test_a_mixture_of_k_quants_loads_and_answers(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "initializer_range": 0.03}
    source = write_gguf_source(tmp_path / "hf", **sizes)
    report = convert(source, tmp_path / "model.gguf", "q4_k_m")
    assert report.types == {"q4_k": 20, "q6_k": 3, "f32": 7}  # attn_v and ffn_down of the last layer, the head
    assert report.notes == ()
    row = greedy_row(report)
    assert row.is_passed is None
    assert "greedy tokens equal; log-probabilities within 0." in row.result


def test_rows_that_are_not_whole_blocks_are_reported(tmp_path, llama):
    report = convert(llama, tmp_path / "model.gguf", "q4_k_s")
    assert report.types == {"q5_0": 19, "q5_1": 3, "q8_0": 1, "f32": 7}  # q4_k, q5_k and q6_k fell back
    assert "3 tensor(s) are q5_0: their rows of 160 values are not whole blocks of 256" in report.notes


@needs_shared_data
def test_hammerllms_tokenizer_differs_only_where_symbols_overlap(tmp_path, monkeypatch):
    changes = {"vocab_size": 105_789, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = tmp_path / "hf"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | changes)))
    model.bfloat16().save_pretrained(source)
    shutil.copy(SHARED_DATA / "tokenizer" / "hammerllm.model", source / "tokenizer.model")
    monkeypatch.setattr(gguf_tokenizer, "load_with_transformers", lambda folder: PlainTokenizer())
    path = tmp_path / "model.gguf"
    export_to_gguf(GgufOptions(load_dir=source, save_path=path, is_verified=False))
    vocabulary = read_vocabulary(source, vocab_size=105_789, config={})
    documents = itertools.islice(read_documents([SHARED_DATA / "corpus" / "zh.jsonl"]), 500)
    with open_llama_cpp(path, num_context_tokens=8, num_threads=1) as llama_cpp:
        comparison = compare_tokenizers(vocabulary, llama_cpp.tokenize, documents)
    assert comparison.num_documents == 500
    assert [difference.line for difference in comparison.differences] == [42, 200, 477]
    assert comparison.count_causes() == {OVERLAP: 3}
