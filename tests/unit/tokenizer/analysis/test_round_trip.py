"""Every class of loss is found, named and shown; a lossless text is never reported."""

import random

import pytest

from megatron_hammer.corpus.readers import Document
from megatron_hammer.tokenizer.analysis.round_trip import RoundTripCounts, TextLossKind, find_losses


@pytest.mark.parametrize(
    "before, after, kind, removed, added",
    [
        ("abc", " abc", TextLossKind.LEADING_SPACES, "", " "),
        ("  abc", "abc", TextLossKind.LEADING_SPACES, "  ", ""),
        ("abc  ", "abc", TextLossKind.TRAILING_SPACES, "  ", ""),
        ("a   bc", "a bc", TextLossKind.INNER_SPACES, "   ", " "),
        ("it's", "it 's", TextLossKind.INNER_SPACES, "", " "),
        ("a\n\nb", "a b", TextLossKind.LINE_ENDS, "\n\n", " "),
        ("a\r\nb", "a\nb", TextLossKind.LINE_ENDS, "\r\n", "\n"),
        ("a\tb", "a b", TextLossKind.TABS, "\t", " "),
        ("a\u3000b", "a b", TextLossKind.NORMALISED, "\u3000", " "),
        ("Ａ12", "A12", TextLossKind.NORMALISED, "Ａ", "A"),
        ("ﬁne", "fine", TextLossKind.NORMALISED, "ﬁ", "fi"),
        ("e\u0301t", "ét", TextLossKind.NORMALISED, "e\u0301", "é"),
        ("e\u0301t", "et", TextLossKind.NORMALISED, "\u0301", ""),
        ("ét", "et", TextLossKind.NORMALISED, "é", "e"),
        ("The", "the", TextLossKind.NORMALISED, "T", "t"),
        ("ab𠮷cd", "ab ⁇ cd", TextLossKind.UNKNOWN, "𠮷", " ⁇ "),
        ("ab𠮷🦀", "ab<unk>", TextLossKind.UNKNOWN, "𠮷🦀", "<unk>"),
        ("𠮷 ab", "[UNK] ab", TextLossKind.UNKNOWN, "𠮷", "[UNK]"),
        ("a\0\0b", "ab", TextLossKind.NUL, "\0\0", ""),
        ("a\0b", "a b", TextLossKind.NUL, "\0", " "),
        ("a\u200bb", "ab", TextLossKind.INVISIBLE, "\u200b", ""),
        ("\ufeffab", "ab", TextLossKind.INVISIBLE, "\ufeff", ""),
        ("a</s>bcd", "abcd", TextLossKind.CONTROL_TOKENS, "</s>", ""),
        ("ab [SEP]", "ab ", TextLossKind.CONTROL_TOKENS, "[SEP]", ""),
        ("ab🦀cd", "ab\ufffd\ufffdcd", TextLossKind.BROKEN_BYTES, "🦀", "\ufffd\ufffd"),
        ("abxycd", "abzcd", TextLossKind.OTHER, "xy", "z"),
        ("abcd", "", TextLossKind.OTHER, "abcd", ""),
    ],
)
def test_every_class_of_loss_is_named(before, after, kind, removed, added):
    (loss,) = find_losses(before, after)
    assert (loss.kind, loss.before, loss.after) == (kind, removed, added)
    assert before[loss.start :].startswith(removed)
    assert after[loss.after_start :].startswith(added)


def test_several_losses_are_found_in_order():
    losses = list(find_losses("  the  dog\n\nｆｕｌｌ 𠮷 end ", "the dog full  ⁇  end"))
    assert [loss.kind for loss in losses] == [
        TextLossKind.LEADING_SPACES,
        TextLossKind.INNER_SPACES,
        TextLossKind.LINE_ENDS,
        *[TextLossKind.NORMALISED] * 4,
        TextLossKind.UNKNOWN,
        TextLossKind.TRAILING_SPACES,
    ]


def test_all_that_lies_between_the_losses_is_equal():
    draw = random.Random(7)
    letters = "ab  \n\t\0é\u0301Ａﬁ𠮷⁇<s>🦀\ufffd字"
    for _ in range(5000):
        before = "".join(draw.choices(letters, k=draw.randrange(30)))
        after = "".join(c for c in before.replace("  ", " ") if draw.random() < 0.9)
        if draw.random() < 0.3:
            after = "".join(draw.choices(letters, k=draw.randrange(30)))
        i = j = 0
        for loss in find_losses(before, after):
            assert before[i : loss.start] == after[j : loss.after_start]
            assert before.startswith(loss.before, loss.start)
            assert after.startswith(loss.after, loss.after_start)
            assert loss.before != loss.after
            i, j = loss.start + len(loss.before), loss.after_start + len(loss.after)
        assert before[i:] == after[j:]


def test_equal_texts_have_no_loss_however_long():
    text = "字a \n" * 20_000
    assert list(find_losses(text, text)) == []
    assert [loss.kind for loss in find_losses(text + "\n", text)] == [TextLossKind.LINE_ENDS]
    (loss,) = find_losses(text + "x" + text, text + text)
    assert (loss.start, loss.before) == (len(text), "x")


def test_counts_are_by_place_and_by_document_with_the_first_example():
    counts = RoundTripCounts()
    counts.add(Document("same", "c.jsonl", 1), "same")
    counts.add(Document("one  two  three", "c.jsonl", 2), "one two three")
    counts.add(Document("1  2", "d.jsonl", 9), "1 2")
    assert (counts.num_documents, counts.num_changed_documents) == (3, 2)
    (loss,) = counts.classes.values()
    assert (loss.num_places, loss.num_documents, loss.where) == (3, 2, "c.jsonl:2")
    assert (loss.before, loss.after) == ("'one  two  thr'", "'one two thre'")


def test_examples_show_what_cannot_be_seen_and_stay_short():
    counts = RoundTripCounts()
    counts.add(Document("a\0b" + "c" * 500, "c.jsonl", 1), "ab" + "c" * 500)
    assert counts.classes[TextLossKind.NUL].before == r"'a\x00bccccccc'"
    counts.add(Document("x" * 500, "c.jsonl", 2), "y")
    assert len(counts.classes[TextLossKind.OTHER].before) < 60
