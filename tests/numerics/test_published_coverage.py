"""HammerLLM's published coverage of the national list of characters, of three tokenizers, to both decimals.

Published: Chinese characters covered at levels one, two and three of the list of 2013 (3,500, 3,000 and 1,605), in %.
"""

import pytest

from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.vocabulary.coverage import measure_coverage, read_character_levels
from tests.helpers.repository import SHARED_DATA, needs_shared_data

PUBLISHED = {
    "internlm-7b": ["100.00", "65.93", "5.67"],
    "llama2-7b": ["17.29", "0.13", "0.00"],
    "hammerllm": ["100.00", "100.00", "100.00"],
}
FOLDER = SHARED_DATA / "tokenizer"


def read_national_levels():
    levels = read_character_levels(FOLDER / "charsets_char.json")
    return {level: characters for level, characters in levels.items() if "通用规范汉字表" in level}


@needs_shared_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_coverage(name):
    levels = measure_coverage(load_encoder(FOLDER / f"{name}.model"), read_national_levels())
    assert [level.num_characters for level in levels] == [3500, 3000, 1605]
    assert [f"{100 * level.covered_ratio:.2f}" for level in levels] == PUBLISHED[name]


@needs_shared_data
def test_twin_other_definitions_do_not_give_the_published_figures():
    """Neither "encodes to one token" (Llama-2 puts a space first) nor "comes back" (bytes do) is what was published."""
    encoder = load_encoder(FOLDER / "llama2-7b.model")
    for is_covered in (
        lambda character: len(encoder.encode(character)) == 1,
        lambda character: encoder.decode(encoder.encode(character)) == character,
    ):
        ratios = [sum(map(is_covered, characters)) / len(characters) for characters in read_national_levels().values()]
        assert [f"{100 * ratio:.2f}" for ratio in ratios] != PUBLISHED["llama2-7b"]
