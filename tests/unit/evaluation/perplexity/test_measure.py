"""Windows, what stands before a document, and documents without a number."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import lm_eval.utils
import numpy as np
import pytest

from megatron_hammer.corpus.readers import Document
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.evaluation.perplexity.domains import Domain
from megatron_hammer.evaluation.perplexity.measure import (
    MeasureOptions,
    ReferenceTokenizer,
    choose_prefix,
    cut_windows,
    measure_model,
)
from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from tests.helpers.scored_models import BOS_ID, EOS_ID, write_byte_tokenizer


class PlainScorer(Scorer):
    """One nat for each token; half behind `good` as the first id; NaN for the letter `bad`."""

    name, max_length, precision = "plain", 8, "fp32"

    def __init__(self, encoder: Encoder, *, good: int | None = None, bad: int | None = None):
        self.encoder, self.good, self.bad = encoder, good, bad

    def score(self, sequences: Sequence[Sequence[int]], num_targets: Sequence[int] | None = None) -> list[TokenScores]:
        scores = []
        for ids, count in zip(sequences, self.count_targets(sequences, num_targets), strict=True):
            values = np.full(count, -0.5 if ids[0] == self.good else -1.0)
            values[[token == self.bad for token in ids[-count:]]] = np.nan
            scores.append(TokenScores(values, np.zeros(count, dtype=bool)))
        return scores

    def choose_next(self, sequences: Sequence[Sequence[int]]) -> list[int]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def make_domain(*texts: str) -> Domain:
    documents = tuple(Document(text, "zh.jsonl", line) for line, text in enumerate(texts, start=1))
    return Domain(name="zh", documents=documents, note="")


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 30])
def test_windows_without_overlap_are_those_of_lm_eval(length: int) -> None:
    ids = list(range(100, 100 + length))
    windows = lm_eval.utils.get_rolling_token_windows(ids, prefix_token=5, max_seq_len=8, context_len=1)
    expected = [([*inputs, targets[-1]], len(targets)) for inputs, targets in windows]
    assert list(cut_windows([5, *ids], 8, 8)) == expected


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_is_scored_once_behind_all_that_fits(stride: int) -> None:
    ids = list(range(30))
    scored = []
    for window, count in cut_windows(ids, 8, stride):
        assert len(window) <= 9
        assert window == ids[window[0] : window[-1] + 1]
        # Of the first window each token has all that stands before it; later ones at least max_length - stride.
        assert window[0] == 0 or len(window) - count >= 8 - stride + 1
        scored += window[-count:]
    assert scored == ids[1:]
    assert list(cut_windows([4], 8, stride)) == []


def test_what_stands_before_a_document(encoder: Encoder, tmp_path: Path) -> None:
    assert choose_prefix(encoder, "auto") == ("BOS", BOS_ID)
    assert choose_prefix(encoder, "bos") == ("BOS", BOS_ID)
    assert choose_prefix(encoder, "eod") == ("EOD", EOS_ID)
    assert choose_prefix(encoder, "none") == ("none", None)
    folder = write_byte_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    alone = load_encoder(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer must have BOS or EOD, got neither.*--bos none"):
        choose_prefix(alone, "auto")


def test_sums_and_counts_follow_the_policy(encoder: Encoder) -> None:
    domain = make_domain("abcdefghijkl", "é")
    for policy, num_scored in (("bos", [12, 2]), ("none", [11, 1])):
        found = measure_model(
            PlainScorer(encoder), [domain], MeasureOptions(bos=policy), reference=ReferenceTokenizer(encoder)
        )
        (scores,) = found.domains
        assert scores.losses.nats.tolist() == num_scored
        assert scores.losses.num_reference_tokens.tolist() == num_scored
        assert scores.losses.num_bytes.tolist() == [12, 2]
        assert scores.num_tokens == sum(num_scored)
    with pytest.raises(DataError, match="domain zh: must have tokens to score, got none behind the first"):
        measure_model(
            PlainScorer(encoder), [make_domain("a")], MeasureOptions(bos="none"), reference=ReferenceTokenizer(encoder)
        )


def test_a_document_without_a_number_is_named(encoder: Encoder) -> None:
    scorer = PlainScorer(encoder, bad=encoder.encode("z")[0])
    (scores,) = measure_model(
        scorer, [make_domain("ab", "az", "b")], MeasureOptions(), reference=ReferenceTokenizer(encoder)
    ).domains
    assert scores.bad_documents == ("zh.jsonl:2",)
    assert [math.isnan(value) for value in scores.losses.nats] == [False, True, False]


def test_a_note_says_where_the_other_token_in_front_does_better(encoder: Encoder) -> None:
    domain = make_domain("abc", "defg")
    found = measure_model(
        PlainScorer(encoder, good=EOS_ID), [domain], MeasureOptions(), reference=ReferenceTokenizer(encoder)
    )
    assert found.prefix == "BOS"
    (note,) = found.notes
    assert "50.0% lower behind EOD than behind BOS" in note
    assert "--bos eod" in note
    assert not measure_model(
        PlainScorer(encoder, good=BOS_ID), [domain], MeasureOptions(), reference=ReferenceTokenizer(encoder)
    ).notes
    # A policy that the user chose is not doubted.
    told = MeasureOptions(bos="bos")
    assert not measure_model(
        PlainScorer(encoder, good=EOS_ID), [domain], told, reference=ReferenceTokenizer(encoder)
    ).notes


@pytest.mark.parametrize(("max_length", "stride"), [(9, None), (4, 5)])
def test_windows_that_cannot_be_are_refused(encoder: Encoder, max_length: int, stride: int | None) -> None:
    options = MeasureOptions(max_length=max_length, stride=stride)
    with pytest.raises(ConfigError, match=f"stride, max-length: must be 1 <= .* <= 8 of plain, got .*={max_length}"):
        measure_model(PlainScorer(encoder), [make_domain("abc")], options, reference=ReferenceTokenizer(encoder))


def test_texts_that_the_tokenizer_changes_are_counted_in_a_note(tmp_path: Path) -> None:
    path = write_byte_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFKC"}}))
    domain = make_domain("１２ Ａ", "é 👨‍👩‍👧\n", "12 A")
    scores = measure_model(
        PlainScorer(load_encoder(path)),
        [domain],
        MeasureOptions(bos="bos"),
        reference=ReferenceTokenizer(load_encoder(path)),
    )
    (note,) = scores.notes
    assert "1 of 3 documents of zh lose characters in its tokenizer, the first at zh.jsonl:1" in note
