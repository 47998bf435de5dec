"""The layout of Megatron's indexed dataset, `<prefix>.bin` and `<prefix>.idx`, shared by its reader and its writer.

.bin: the token ids of every sequence, one after another, with nothing between them.
.idx: magic (9 bytes), version (u64), dtype code (u8), number of sequences S (u64), length D of the document index
(u64); then lengths int32[S], byte offsets into .bin int64[S], document index int64[D] (document d holds the sequences
from entry d up to entry d + 1; the first entry is 0), and in multimodal data sets a mode int8[S].
Source: megatron/core/datasets/indexed_dataset.py; tests/unit/data/indexed/test_pair.py pins byte equality with it.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_hammer.errors import DataError

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_VERSION = 1
IDX_HEADER_BYTES = 34
LENGTH_BYTES = 4
OFFSET_BYTES = 8
DOCUMENT_BYTES = 8
DTYPE_BY_CODE: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}


def select_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron stores this vocabulary in: uint16 under 65,500 ids, else int32."""
    # The bound is Megatron-LM's, DType.optimal_dtype: 65,500 and not 65,536.
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")  # not with_suffix: a prefix may contain dots


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def encode_header(dtype: np.dtype, num_sequences: int, num_documents: int) -> bytes:
    """Return the first IDX_HEADER_BYTES of an .idx; the document index has one entry more than there are documents."""
    return IDX_MAGIC + struct.pack("<QBQQ", IDX_VERSION, CODE_BY_DTYPE[dtype], num_sequences, num_documents + 1)


def count_index_bytes(num_sequences: int, num_documents: int) -> int:
    """Return the size of an .idx without modes."""
    return IDX_HEADER_BYTES + num_sequences * (LENGTH_BYTES + OFFSET_BYTES) + (num_documents + 1) * DOCUMENT_BYTES


def read_array(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    """Read the next `count` entries: [count]. Raises DataError if the file ends before.

    Not numpy.fromfile: that turns Ctrl-C into a TypeError, and silently returns fewer entries.
    """
    array = np.empty(count, dtype)
    num_bytes = file.readinto(array.data) if count else 0  # type: ignore[attr-defined]
    if num_bytes != array.nbytes:
        raise DataError(
            f"{file.name}: file must have {array.nbytes} more bytes here, got {num_bytes}. "
            "It was cut while it was read; preprocess or copy it again."
        )
    return array
