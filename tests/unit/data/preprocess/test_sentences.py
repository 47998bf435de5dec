"""Sentences are cut by nltk's model, found as nltk finds it and never fetched."""

import hashlib
import re
import sys
from pathlib import Path

import nltk.data
import pytest
from nltk.tokenize.punkt import PunktTokenizer

from megatron_hammer.data.preprocess.sentences import PIECE_CHARS, hash_sentence_model, load_sentence_splitter
from megatron_hammer.errors import DataError, PlatformError
from tests.helpers.messages import raises_problem
from tests.helpers.punkt_model import write_punkt_model

TEXT = 'Dr. Smith went home.\nHe slept! Then... he (woke).  \n\n"Why?" Nobody knew.\n'


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    return write_punkt_model(tmp_path)


def test_sentences_are_those_of_nltk(model_dir: Path) -> None:
    split = load_sentence_splitter("english", keep_newlines=False)
    assert split(TEXT) == PunktTokenizer("english").tokenize(TEXT)
    assert split(TEXT)[0] == "Dr. Smith went home."
    assert split("") == []


def test_newlines_are_kept_behind_their_sentence(model_dir: Path) -> None:
    text = TEXT.replace('"', "")  # behind a quotation mark nltk drops the space even so
    sentences = load_sentence_splitter("english", keep_newlines=True)(text)
    assert "".join(sentences) == text.rstrip("\n")
    assert sentences[0] == "Dr. Smith went home.\n"


def test_a_long_run_without_spaces_takes_linear_time(model_dir: Path) -> None:
    run = "x" * 200_000
    assert load_sentence_splitter("english", keep_newlines=True)(run + " End. Next") == [run + " End. ", "Next"]


def test_long_texts_are_cut_where_megatron_lm_cuts_them(model_dir: Path) -> None:
    text = "word " * (PIECE_CHARS // 5) + "rest"
    split = load_sentence_splitter("english", keep_newlines=False)
    assert split(text) == [text[:PIECE_CHARS].strip(), "rest"]


def test_the_hash_follows_the_model(model_dir: Path) -> None:
    before = hash_sentence_model("english")
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    assert before != hashlib.sha256().hexdigest()
    (model_dir / "abbrev_types.txt").write_text("prof\n")
    assert hash_sentence_model("english") != before


@pytest.mark.parametrize("language", ["klingon", "../english"])
def test_a_missing_model_says_how_to_get_it(model_dir: Path, language: str) -> None:
    remedies = ("`python -m nltk.downloader punkt_tab`", "NLTK_DATA", f"tokenizers/punkt_tab/{language}", "--lang")
    with raises_problem(DataError, "split-sentences:", f"language {language}, got none", *remedies):
        load_sentence_splitter(language, keep_newlines=False)


def test_an_incomplete_model_counts_as_missing(model_dir: Path) -> None:
    (model_dir / "ortho_context.tab").unlink()
    with pytest.raises(DataError, match=r"split-sentences: nltk must have its Punkt.* english, got none"):
        hash_sentence_model("english")


def test_a_missing_nltk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.data", None)
    with raises_problem(PlatformError, "split-sentences:", "nltk must be installed", "`pip install nltk`"):
        hash_sentence_model("english")
