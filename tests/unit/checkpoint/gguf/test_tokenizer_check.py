"""A difference with a known cause is listed under it; any other does not pass."""

import unicodedata

import pytest
import tokenizers

from megatron_hammer.checkpoint.gguf.tokenizer import _GPT2_RULE, GgufVocabulary, read_vocabulary
from megatron_hammer.checkpoint.gguf.tokenizer_check import (
    COMPOSED,
    OVERLAP,
    SPELT_OUT,
    UNEXPLAINED,
    compare_tokenizers,
    list_examples,
    list_overlaps,
    summarise_tokenizers,
)
from megatron_hammer.corpus.readers import Document
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers.gguf_models import VOCAB_SIZE, make_toy_model, write_byte_level
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> GgufVocabulary:
    """Symbols "---" and "-->" overlap, as two of HammerLLM's do."""
    folder = tmp_path_factory.mktemp("vocabulary")
    options = MODEL_OPTIONS["plain"] | {"user_defined_symbols": ["---", "-->"]}
    model = train_model(folder / "symbols.model", **options)
    export_tokenizer(model, folder, max_length=None)
    return read_vocabulary(folder, vocab_size=400, config={})


def id_of(vocabulary: GgufVocabulary, text: str) -> int:
    return vocabulary.tokens.index(text)


def test_texts_in_which_symbols_overlap():
    assert list_overlaps(["---", "-->", "<h1>"]) == ["---->", "--->"]
    assert list_overlaps(["0", "1", "```"]) == []


def test_equal_tokens_pass(vocabulary):
    documents = [Document("the dog", "a.jsonl", 1), Document("春眠", "a.jsonl", 2)]
    comparison = compare_tokenizers(vocabulary, lambda text: vocabulary.encoder.encode(text).tolist(), documents)
    assert comparison.differences == []
    sentence, is_explained = summarise_tokenizers(comparison)
    assert sentence == f"equal on 2 texts, {comparison.num_tokens} tokens"
    assert is_explained


def test_an_overlap_is_named_where_it_is(vocabulary):
    text = "the --->dog and the fox"
    expected = vocabulary.encoder.encode(text).tolist()
    place = expected.index(id_of(vocabulary, "---"))
    assert vocabulary.tokens[expected[place + 1]] == "<0x3E>"  # ">", which the toy texts lack
    got = [*expected[:place], id_of(vocabulary, "<0x2D>"), id_of(vocabulary, "-->"), *expected[place + 2 :]]
    comparison = compare_tokenizers(vocabulary, lambda _: got, [Document(text, "a.jsonl", 9)])
    assert comparison.count_causes() == {OVERLAP: 1}
    assert summarise_tokenizers(comparison)[1]
    (example,) = list_examples(comparison, most=3)
    assert example.startswith(f"a.jsonl:9: {OVERLAP}; ")
    assert "'---' '<0x3E>'" in example
    assert "'<0x2D>' '-->'" in example


def test_a_control_token_spelt_out_is_named(vocabulary):
    text = "a<s>b"
    got = [id_of(vocabulary, "a"), id_of(vocabulary, "<s>"), id_of(vocabulary, "b")]
    comparison = compare_tokenizers(vocabulary, lambda _: got, [Document(text, "a.jsonl", 1)])
    assert comparison.count_causes() == {SPELT_OUT: 1}


def test_twin_a_difference_elsewhere_in_such_a_text_does_not_pass(vocabulary):
    text = "---> and then, much later in the text, the quick brown fox"
    expected = vocabulary.encoder.encode(text).tolist()
    got = [*expected[:-1], id_of(vocabulary, "z")]
    comparison = compare_tokenizers(vocabulary, lambda _: got, [Document(text, "a.jsonl", 1)])
    assert comparison.count_causes() == {UNEXPLAINED: 1}
    sentence, is_explained = summarise_tokenizers(comparison)
    assert sentence.endswith("1 with no known cause")
    assert not is_explained


def test_the_toy_model_has_no_overlaps(tmp_path):
    export_tokenizer(make_toy_model(), tmp_path, max_length=None)
    toy = read_vocabulary(tmp_path, vocab_size=VOCAB_SIZE, config={})
    comparison = compare_tokenizers(toy, lambda text: [5], [Document("the", "a", 1)])
    assert comparison.count_causes() == {UNEXPLAINED: 1}


# --- an excuse must account for the very difference ------------------------------------------------------------


@pytest.fixture(scope="module")
def composing(tmp_path_factory) -> GgufVocabulary:
    """A byte-level BPE whose tokenizer.json composes characters before it encodes."""
    folder = tmp_path_factory.mktemp("composing")
    write_byte_level(folder, _GPT2_RULE, normalizer={"type": "NFC"})
    return read_vocabulary(folder, vocab_size=320, config={})


def compare_composing(vocabulary: GgufVocabulary, text: str, tokenize) -> dict[str, int]:
    return compare_tokenizers(vocabulary, tokenize, [Document(text, "a.jsonl", 1)]).count_causes()


def test_composed_characters_are_excused_where_they_are_all_that_differs(composing):
    text = unicodedata.normalize("NFD", "the café and the fox")
    plain = tokenizers.Tokenizer.from_str(composing.encoder.tokenizer.to_str())
    plain.normalizer = tokenizers.normalizers.Sequence([])  # as llama.cpp, which composes nothing
    assert compare_composing(composing, text, lambda text: plain.encode(text).ids) == {COMPOSED: 1}


def test_twin_one_decomposed_character_excuses_nothing_else(composing):
    text = unicodedata.normalize("NFD", "the café and the fox")
    wrong = composing.encoder.encode("the café and the dog").tolist()
    assert compare_composing(composing, text, lambda _: wrong) == {UNEXPLAINED: 1}


def test_twin_a_reserved_token_in_the_text_excuses_only_itself(vocabulary):
    """llama.cpp gives another letter beside "<s>", and leaves "<s>" text as the tokenizer does."""
    text = "a<s>b"
    got = vocabulary.encoder.encode(text).tolist()
    got[-1] = id_of(vocabulary, "z")
    comparison = compare_tokenizers(vocabulary, lambda _: got, [Document(text, "a.jsonl", 1)])
    assert comparison.count_causes() == {UNEXPLAINED: 1}


def test_twin_an_overlap_that_both_cut_alike_excuses_nothing(vocabulary):
    text = "--->b"
    got = vocabulary.encoder.encode(text).tolist()
    got[-1] = id_of(vocabulary, "z")
    comparison = compare_tokenizers(vocabulary, lambda _: got, [Document(text, "a.jsonl", 1)])
    assert comparison.count_causes() == {UNEXPLAINED: 1}
