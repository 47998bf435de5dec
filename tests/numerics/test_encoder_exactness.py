"""The fast encoder returns the ids of sentencepiece on every document that we have, and on hostile text."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from megatron_hammer.tokenizer.encoding.fast_encoder import EncoderChoice, FastEncoder, PartwiseEncoder, select_encoder
from megatron_hammer.tokenizer.encoding.native_encoder import NativeEncoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import read_sentencepiece_model
from tests.helpers.hostile_text import build_hostile_texts
from tests.helpers.repository import SHARED_DATA, needs_shared_data

MODEL_NAMES = ("hammerllm", "llama2-7b", "internlm-7b")
LONG_RUN_CHARS = 1_100_000  # from 2^20 on the native encoder merges in passes

pytestmark = needs_shared_data


@pytest.fixture(scope="module", params=[(name, kind) for name in MODEL_NAMES for kind in ("native", "fastokens")])
def choice(request) -> EncoderChoice:
    name, kind = request.param
    return select_encoder(load_encoder(SHARED_DATA / "tokenizer" / f"{name}.model"), kinds=(kind,))


@pytest.fixture(scope="module")
def hammerllm() -> Encoder:
    return select_encoder(load_encoder(SHARED_DATA / "tokenizer" / "hammerllm.model")).load()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    corpora = sorted((SHARED_DATA / "corpus").glob("*.jsonl"))
    texts = [document.text for document in read_documents(corpora)]
    for path in sorted((SHARED_DATA / "post_training").glob("*.json")):
        texts.extend(list_strings(json.loads(path.read_text(encoding="utf-8"))))
    return texts


def list_strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from list_strings(part)


def find_differing(encoder: Encoder, reference: Encoder, texts: list[str]) -> list[str]:
    ids, lengths = encoder.encode_batch(texts)
    split_ids = np.split(ids, np.cumsum(lengths)[:-1])
    return [text for text, got in zip(texts, split_ids, strict=True) if not np.array_equal(got, reference.encode(text))]


def test_every_document(choice, documents):
    assert choice.warning is None
    assert len(documents) > 8_000
    assert find_differing(choice.load(), load_encoder(choice.reference.path), documents) == []


def test_hostile_text(choice):
    texts = build_hostile_texts(list_surfaces(choice.reference.path), num_texts=6000, seed=23)
    assert find_differing(choice.load(), load_encoder(choice.reference.path), texts) == []


def list_surfaces(path: Path) -> list[str]:
    return [piece.text.replace("▁", " ") for piece in read_sentencepiece_model(path).pieces]


@pytest.mark.parametrize("character", ["a", " ", "\n", "。", "\0", "0", "\U000e0001", "ab", "the"])
def test_long_runs(hammerllm, character):
    text = "begin " + character * LONG_RUN_CHARS + " end"
    assert find_differing(hammerllm, load_encoder(hammerllm.path), [text]) == []


def test_one_long_line_in_parts(choice, documents):
    line = "".join(documents)[:2_000_000].replace("\n", " ")
    reference = load_encoder(choice.reference.path)
    expected = reference.encode(line)
    assert choice.cutter is not None
    assert np.array_equal(choice.load().encode(line), expected)
    assert np.array_equal(PartwiseEncoder(reference, choice.cutter, max_part_chars=1000).encode(line), expected)


def test_twin_one_merge_less_is_noticed(choice, documents):
    if choice.tables is not None:
        tables = dataclasses.replace(choice.tables, lefts=choice.tables.lefts.copy())
        tables.lefts[np.flatnonzero(choice.tables.merged == most_used_piece(choice, documents))] = -2
        broken = NativeEncoder(load_encoder(choice.reference.path), tables, prefix=choice.prefix)
        assert find_differing(broken, load_encoder(choice.reference.path), documents[:4000])
        return
    definition = orjson.loads(choice.definition or b"")
    definition["model"]["merges"].remove("在 线" if "在 线" in definition["model"]["merges"] else "t h")
    broken = FastEncoder(load_encoder(choice.reference.path), orjson.dumps(definition), prefix=choice.prefix)
    assert find_differing(broken, load_encoder(choice.reference.path), documents[:4000])


def most_used_piece(choice: EncoderChoice, documents: list[str]) -> int:
    """Of the pieces that merges make."""
    ids, _ = choice.load().encode_batch(documents[:400])
    counts = np.bincount(ids)
    assert choice.tables is not None
    made = choice.tables.merged[choice.tables.merged < len(counts)]
    return int(made[np.argmax(counts[made])])
