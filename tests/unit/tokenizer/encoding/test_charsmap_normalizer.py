"""The steps replace in every text what sentencepiece replaces."""

import random
import unicodedata

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding import charsmap_normalizer
from megatron_hammer.tokenizer.encoding.charsmap_normalizer import list_charsmap_steps, list_normalized_texts
from tests.helpers.hostile_text import build_hostile_texts

RULES = ("nfkc_cf", "nmt_nfkc")  # between them, everything that the four rules of sentencepiece do


def load_rule(name: str) -> tuple[sentencepiece.SentencePieceNormalizer, bytes]:
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=name, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    spec = sentencepiece_model_pb2.NormalizerSpec.FromString(normalizer.serialized_normalizer_spec())
    return normalizer, spec.precompiled_charsmap


@pytest.mark.parametrize("name", RULES)
def test_random_texts_are_normalised_alike(name):
    reference, precompiled = load_rule(name)
    steps = normalizers.Sequence(list_charsmap_steps(precompiled, "a.model"))
    texts = [*list_normalized_texts(precompiled)]
    texts += build_hostile_texts(["ｶﾞ", "ﾊﾟ", "e\u0301\u0323", "ﬁ\u0301", "각", "\u1100\u1161"], num_texts=500, seed=4)
    draw = random.Random(2)
    chars = [chr(code) for code in range(1, 0x3400) if unicodedata.category(chr(code)) != "Cs"]
    texts += ["".join(draw.choices(chars, k=40)) for _ in range(700)]
    assert len(texts) == 1500
    assert [text for text in texts if steps.normalize_str(text) != reference.normalize(text)] == []


def test_twin_the_librarys_own_reading_of_the_map_differs():
    reference, precompiled = load_rule("nfkc_cf")
    own = normalizers.Precompiled(precompiled)
    texts = [*list_normalized_texts(precompiled)]
    assert sum(own.normalize_str(text) != reference.normalize(text) for text in texts) > 100


@pytest.mark.parametrize(
    "rules, reason",
    [
        ({"ab": "x"}, "NFC replaces"),
        ({"a": "b", "b": "c"}, "replaced again"),
    ],
)
def test_a_map_of_another_kind_is_refused(rules, reason):
    with pytest.raises(ConversionError, match=rf"a.model: tokenizer must be one.*{reason}.*--no-tokenizer"):
        list_charsmap_steps(charsmap_normalizer._compile(rules), "a.model")
