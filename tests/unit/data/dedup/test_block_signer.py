"""A worker turns a block into digests, signatures and one line per document."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.corpus.blocks import BlockKind, read_blocks, select_whole_files
from megatron_hammer.data.dedup.block_signer import BlockSignerRecipe, digest_text, encode_line
from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions, Signer
from megatron_hammer.errors import DataError

OPTIONS = NearDuplicateOptions(num_permutations=32)


def build_recipe(path: Path, near_duplicates: NearDuplicateOptions | None = OPTIONS) -> BlockSignerRecipe:
    return BlockSignerRecipe(
        paths=(str(path),), json_key="text", ignores_whitespace=False, near_duplicates=near_duplicates
    )


def test_a_block_is_signed(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": " "}\n{"text": "春", "k": 1}\n', encoding="utf-8")
    (block,) = read_blocks(select_whole_files([path]), ("text",))
    signed = pickle.loads(pickle.dumps(build_recipe(path)))()(block)
    assert (signed.file_index, signed.first_line) == (0, 1)
    assert signed.lines == tuple(path.read_bytes().splitlines(keepends=True))
    assert signed.text_bytes.tolist() == [5, 1, 3]
    assert signed.is_signed.tolist() == [True, False, True]
    assert signed.digests.tolist() == [digest_text(text, ignores_whitespace=False) for text in ("a b c", " ", "春")]
    assert np.array_equal(signed.signatures, np.stack([Signer(OPTIONS).sign(text) for text in ("a b c", "春")]))
    assert build_recipe(path, near_duplicates=None)()(block).signatures is None


def test_a_bad_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    (block,) = read_blocks(select_whole_files([path]), ("text",))
    with pytest.raises(DataError, match=r'in\.jsonl:2: field "text" must be a string, got a number\.'):
        build_recipe(path)()(block)


def test_white_space_may_not_count() -> None:
    assert digest_text("a\u3000b\n", ignores_whitespace=True) == digest_text("a b", ignores_whitespace=False)
    assert digest_text("a  b", ignores_whitespace=False) != digest_text("a b", ignores_whitespace=False)


@pytest.mark.parametrize(
    "kind, payload, line",
    [
        (BlockKind.LINES, b'{"text":  "a", "n": 1e400}\r', b'{"text":  "a", "n": 1e400}\n'),
        (BlockKind.ELEMENTS, b' {"text": "a",\r\n"n": 1}', b'{"text": "a",  "n": 1}\n'),
        (BlockKind.ROWS, {"text": "a"}, b'{"k":"a"}\n'),
        (BlockKind.TEXT, b"a", b'{"k":"a"}\n'),
    ],
)
def test_a_document_becomes_a_line(kind: BlockKind, payload: bytes, line: bytes) -> None:
    assert encode_line(kind, payload, "a", "k") == line
