"""The presets are what the published models store, apart from the differences that are named here."""

import dataclasses
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from megatron_hammer.tokenizer.vocabulary.recipes import HAMMERLLM_128K, RECIPES, TINY_LLM_ZH_20K, TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import TextSource
from megatron_hammer.tokenizer.vocabulary.train import train_tokenizer
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl


def train(tmp_path: Path, recipe: TokenizerRecipe) -> sentencepiece_model_pb2.ModelProto:
    corpus_path = write_jsonl(tmp_path / "corpus.jsonl", TOY_TEXTS * 7)
    path = train_tokenizer([TextSource(inputs=(corpus_path,))], tmp_path / "t.model", recipe).path
    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())


def list_differences(ours, published) -> set[str]:
    return {
        field.name
        for field in ours.DESCRIPTOR.fields
        if getattr(ours, field.name) != getattr(published, field.name)  # an absent field has its default
    }


@needs_shared_data
def test_hammerllms_recipe_differs_from_its_stored_one_only_where_named(tmp_path: Path) -> None:
    path = SHARED_DATA / "tokenizer" / "hammerllm-trained-128k.model"
    published = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    ours = train(tmp_path, dataclasses.replace(HAMMERLLM_128K, vocab_size=331))
    assert list_differences(ours.trainer_spec, published.trainer_spec) == {
        "vocab_size",  # a toy's
        "num_threads",  # stored as 1, because it changes nothing else
        "required_chars",  # from files; theirs are joined by commas
        "user_defined_symbols",  # from files
    }
    assert HAMMERLLM_128K.vocab_size == published.trainer_spec.vocab_size
    assert list_differences(ours.normalizer_spec, published.normalizer_spec) == {
        "name",  # nmt_nfkc loses text, and was left behind when the pieces were merged into InternLM's model
        "precompiled_charsmap",
        "add_dummy_prefix",
        "remove_extra_whitespaces",
    }


@needs_shared_data
def test_hammerllms_normalizer_is_that_of_its_published_model(tmp_path: Path) -> None:
    path = SHARED_DATA / "tokenizer" / "hammerllm.model"
    published = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    ours = train(tmp_path, dataclasses.replace(HAMMERLLM_128K, vocab_size=331))
    assert list_differences(ours.normalizer_spec, published.normalizer_spec) == set()


def test_tiny_llms_recipe_stores_what_its_published_model_stores(tmp_path: Path) -> None:
    """That model is not among the shared data; these are the values read from it."""
    ours = train(tmp_path, dataclasses.replace(TINY_LLM_ZH_20K, vocab_size=331))
    spec, normalizer = ours.trainer_spec, ours.normalizer_spec
    assert TINY_LLM_ZH_20K.vocab_size == 20_000
    assert spec.model_type == spec.BPE
    assert spec.character_coverage == pytest.approx(0.9995)
    assert (spec.max_sentence_length, spec.max_sentencepiece_length) == (4192, 16)
    assert (spec.byte_fallback, spec.split_digits, spec.allow_whitespace_only_pieces) == (True, True, True)
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert (normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (True, True)


def test_presets_have_names() -> None:
    assert RECIPES == {"hammerllm-128k": HAMMERLLM_128K, "tiny-llm-zh-20k": TINY_LLM_ZH_20K}
