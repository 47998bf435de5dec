"""The script of a document decides with which others its fertility is averaged."""

import pytest

from megatron_hammer.tokenizer.analysis.script import Script, count_units, detect_script


@pytest.mark.parametrize(
    "text, script",
    [
        ("春眠不觉晓，处处闻啼鸟。", Script.HAN),
        ("𠮷𠮷", Script.HAN),
        ("TiDB 是数据库", Script.HAN),
        ("use TiDB, a database, 数据", Script.LATIN),
        ("Größe ﬁ ｆｕｌｌ", Script.LATIN),
        ("def f(x): return x", Script.LATIN),
        ("Привет, мир", Script.OTHER),
        ("日本語のひらがなとカタカナ", Script.OTHER),
        ("한국어", Script.OTHER),
        ("", Script.NONE),
        ("12 + 3 = 15！", Script.NONE),
        ("字 a", Script.HAN),  # as many units of each: the first of Han, Latin, other
    ],
)
def test_the_script_with_the_most_units_counts(text, script):
    assert detect_script(text) == script


def test_units_are_words_for_latin_and_characters_else():
    assert count_units(" the  quick,\n brown fox ", Script.LATIN) == 4
    assert count_units("春 眠\n不觉晓， a1", Script.HAN) == 8
    assert count_units("мир", Script.OTHER) == 3
    assert count_units("", Script.NONE) == 0
