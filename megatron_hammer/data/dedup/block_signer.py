"""Digests and MinHash signatures of blocks of raw documents. Runs in worker processes."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_hammer.corpus.blocks import Block, BlockKind
from megatron_hammer.corpus.readers import decode_documents
from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions, Signer

# 128 bits: among 10^10 documents, two different ones agree with a chance below 10^-18.
DIGEST_BYTES = 16
# Fixed-size bytes, because numpy sorts and searches them; two integers would need a structured type.
DIGEST_DTYPE = np.dtype(f"S{DIGEST_BYTES}")
LINE_ENDS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


@dataclass(frozen=True, slots=True)
class SignedBlock:
    """The documents of a block, in order.

    lines: each as a JSON line. digests: [n] of DIGEST_DTYPE. text_bytes: int64 [n], of UTF-8. is_signed: bool [n],
    False for a text without words. signatures: uint32 [is_signed.sum(), num_permutations], None where none are wanted.
    """

    file_index: int
    first_line: int
    lines: tuple[bytes, ...]
    digests: np.ndarray
    text_bytes: np.ndarray
    is_signed: np.ndarray
    signatures: np.ndarray | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSignerRecipe:
    """What a worker needs to sign blocks; paths: of the files, for messages and in the order of `file_index`."""

    paths: tuple[str, ...]
    json_key: str
    ignores_whitespace: bool
    near_duplicates: NearDuplicateOptions | None

    def __call__(self) -> Callable[[Block], SignedBlock]:
        signer = None if self.near_duplicates is None else Signer(self.near_duplicates)
        return lambda block: self._sign(block, signer)

    def _sign(self, block: Block, signer: Signer | None) -> SignedBlock:
        """Raises DataError naming file:line at the first record that is not a document."""
        texts, lines = [], []
        for payload, document in decode_documents(block, self.paths[block.begin.file_index], self.json_key):
            texts.append(document.text)
            lines.append(encode_line(block.kind, payload, document.text, self.json_key))
        digests = [digest_text(text, ignores_whitespace=self.ignores_whitespace) for text in texts]
        signatures = [signer.sign(text) if signer is not None else None for text in texts]
        signed = [signature for signature in signatures if signature is not None]
        # The column count must be given: a block in which no document has words gives an empty list.
        num_permutations = 0 if self.near_duplicates is None else self.near_duplicates.num_permutations
        return SignedBlock(
            file_index=block.begin.file_index,
            first_line=block.begin.num_records + 1,
            lines=tuple(lines),
            digests=np.array(digests, dtype=DIGEST_DTYPE),
            text_bytes=np.array([len(text.encode("utf-8")) for text in texts], dtype=np.int64),
            is_signed=np.array([signature is not None for signature in signatures], dtype=bool),
            signatures=np.array(signed, dtype=np.uint32).reshape(-1, num_permutations) if signer is not None else None,
        )


def digest_text(text: str, *, ignores_whitespace: bool) -> bytes:
    """Return a digest of 16 bytes; ignores_whitespace: a run of it counts as one space, and as none at the ends."""
    compared = " ".join(text.split()) if ignores_whitespace else text
    return hashlib.blake2b(compared.encode("utf-8"), digest_size=DIGEST_BYTES).digest()


def encode_line(kind: BlockKind, payload: bytes | dict[str, Any], text: str, json_key: str) -> bytes:
    """Return the document as a JSON line: if it was read from JSON, that JSON with all its fields."""
    if kind in (BlockKind.LINES, BlockKind.ELEMENTS) and isinstance(payload, bytes):
        # In JSON, line ends occur only between values: in strings they are escaped.
        # Not parsed and written again: the spelling of numbers and escapes would change.
        return payload.strip().translate(LINE_ENDS_TO_SPACES) + b"\n"
    return orjson.dumps({json_key: text}, option=orjson.OPT_APPEND_NEWLINE)
