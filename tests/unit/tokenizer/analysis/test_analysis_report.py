"""Tables, JSON, CSV and plot show the counts, with every ratio over the right number."""

import csv
import io
import json

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from megatron_hammer.corpus.readers import Document
from megatron_hammer.tokenizer.analysis.analysis_files import _drawable, write_csv, write_plot
from megatron_hammer.tokenizer.analysis.analysis_report import describe_analysis, print_analysis, summarise_analysis
from megatron_hammer.tokenizer.analysis.analyze import analyze_tokenizers
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from megatron_hammer.tokenizer.vocabulary import coverage
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer

DOCUMENTS = [Document(text, "c.jsonl", line) for line, text in enumerate((*TOY_TEXTS, "a  b", ""), start=1)]
LEVELS = {"常用": tuple("春眠龘"), "[b]rare": ("龘",)}


class SpaceLoser(Encoder):
    """One token a character, and every double space becomes one when decoded."""

    def __init__(self, encoder: Encoder):
        self.path, self.sha256, self.vocab_size = encoder.path, encoder.sha256, 0x110000
        self.special_tokens = encoder.special_tokens

    def encode(self, text):
        return np.array([ord(character) for character in text], dtype=np.int32)

    def decode(self, ids):
        return "".join(map(chr, ids)).replace("  ", " ")


@pytest.fixture
def analysis(tmp_path, monkeypatch):
    encoder = load_encoder(train_toy_tokenizer(tmp_path))
    monkeypatch.setattr(coverage, "list_character_tokens", lambda e: frozenset("春眠" if e is encoder else ""))
    encoders = {"汉 ours": encoder, "[red]chars": SpaceLoser(encoder)}
    return analyze_tokenizers(encoders, DOCUMENTS, levels=LEVELS, reference="[red]chars")


def test_every_ratio_is_over_the_right_number(analysis):
    described = describe_analysis(analysis)
    assert json.loads(json.dumps(described)) == described
    ours, chars = described["tokenizers"]
    han, num_chars = described["scripts"]["Han"], len(TOY_TEXTS[2])
    assert chars["scripts"]["Han"]["num_tokens"] == num_chars
    assert chars["scripts"]["Han"]["bytes_per_token"] == len(TOY_TEXTS[2].encode()) / num_chars
    assert chars["scripts"]["Han"]["fertility"] == num_chars / han["num_units"] == num_chars / (num_chars - 2)
    assert chars["scripts"]["Latin"]["fertility_unit"] == "word"
    assert chars["corpus"]["tokens_ratio"] == 1.0
    assert ours["corpus"]["tokens_ratio"] == ours["corpus"]["num_tokens"] / chars["corpus"]["num_tokens"] < 1
    assert ours["corpus"]["bytes_per_token"] == described["text_bytes"] / ours["corpus"]["num_tokens"]
    assert [level["covered_ratio"] for level in ours["coverage"].values()] == [2 / 3, 0.0]
    assert ours["scripts"]["none"]["bytes_per_token"] is None
    assert chars["round_trip"]["num_changed_documents"] == 2
    loss = chars["round_trip"]["losses"]["spaces inside"]
    assert (loss["num_places"], loss["num_documents"], loss["where"]) == (3, 2, "c.jsonl:2")
    assert ours["round_trip"]["losses"] == {}


def test_tables_print_names_as_they_are(analysis):
    stream = io.StringIO()
    print_analysis(analysis, Console(file=stream, width=160))
    printed = stream.getvalue()
    for text in ("66.67", "[b]rare", "[red]chars", "汉 ours", "Corpus: 5 documents", "tokens a word", "spaces inside"):
        assert text in printed
    assert "documents changed by a round trip: 汉 ours 0, [red]chars 2; 1.5 s" in summarise_analysis(analysis, 1.5)


def test_csv_has_a_row_a_tokenizer(analysis, tmp_path):
    write_csv(analysis, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        ours, chars = csv.DictReader(file)
    assert ours["coverage_percent 常用"] == "66.67"
    assert (ours["documents"], ours["changed_documents"], chars["changed_documents"]) == ("5", "0", "2")
    assert chars["corpus tokens_ratio"] == "1.000000"
    assert chars["losses"] == "spaces inside: 3"
    assert ours["none bytes_per_token"] == ""
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("documents, levels", [(DOCUMENTS, LEVELS), (DOCUMENTS, None), ((), LEVELS)])
def test_the_picture_has_a_panel_for_what_was_counted(tmp_path, documents, levels, recwarn):
    encoder = load_encoder(train_toy_tokenizer(tmp_path))
    analysis = analyze_tokenizers({"汉": encoder, "$b$": encoder}, documents, levels=levels)
    write_plot(analysis, tmp_path / "a.png")
    height, width, _ = image.imread(tmp_path / "a.png").shape
    num_panels = 3 * bool(documents) + bool(levels)
    assert (width > 1000, height > 900) == (num_panels > 1, num_panels > 2)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_name_that_the_font_lacks_is_spelt_out():
    assert _drawable("汉-1") == r"\u6c49-1"
    assert _drawable("Llama-2 é") == "Llama-2 é"
