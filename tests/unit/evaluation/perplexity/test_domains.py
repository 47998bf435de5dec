"""Domains of files and of pairs."""

from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.pair import IndexedWriter
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.evaluation.perplexity.domains import DomainOptions, read_domain
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.indexed_writing import add_document
from tests.helpers.scored_models import BOS_ID, EOS_ID, TEXTS, write_byte_tokenizer
from tests.helpers.toy_tokenizer import write_jsonl


def test_a_file_is_read_as_the_preprocessor_reads_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "zh.jsonl", ["春眠不觉晓", "", "花落知多少"], key="content")
    found = read_domain("zh", str(path), DomainOptions(json_key="content", max_characters=2))
    assert [(one.text, one.line) for one in found.documents] == [("春眠", 1), ("花落", 3)]
    assert found.note == f"zh: 2 documents of {path}, each to its character 2; 1 empty ones left out"
    assert len(read_domain("zh", str(path), DomainOptions(json_key="content", max_documents=1)).documents) == 1


def test_a_pair_is_read_as_text_without_the_tokens_that_were_added(tmp_path: Path) -> None:
    encoder = load_encoder(write_byte_tokenizer(tmp_path))
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        for text, before, after in zip(TEXTS, ([], [BOS_ID], [], [BOS_ID]), ([], [EOS_ID], [EOS_ID], []), strict=True):
            add_document(writer, np.array([*before, *encoder.encode(text), *after], dtype=np.uint16))
    found = read_domain("all", str(tmp_path / "pair"), DomainOptions(pair_encoder=encoder))
    assert tuple(one.text for one in found.documents) == TEXTS
    with pytest.raises(ConfigError, match=r"pair: a pair needs the tokenizer.*--data-tokenizer"):
        read_domain("all", str(tmp_path / "pair"), DomainOptions())


def test_a_domain_without_text_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "zh.jsonl", ["", ""])
    with pytest.raises(DataError, match="domain zh must have text, got 2 empty documents"):
        read_domain("zh", str(path), DomainOptions())
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_domain("zh", str(tmp_path / "none.jsonl"), DomainOptions())
