"""SentencePiece BPE in C (bpe_kernel.c), built by pip, or compiled when it is first used.

Without the built kernel and without a C compiler, `load_kernel` returns None and another encoder does the work.
`build_kernel_tables` says what a model must be. fast_encoder.py checks the result against sentencepiece at every start,
as for every fast encoder.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.errors import ConversionError, PlatformError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, copy_facts
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import (
    NUL,
    list_symbols,
    refuse_rewriting,
)
from megatron_hammer.tokenizer.encoding.sentencepiece_model import PieceType, SentencePieceModel

SOURCE_PATH = Path(__file__).with_name("bpe_kernel.c")
COMPILER_FLAGS = ("-O3", "-shared", "-fPIC")
# The file compiles in seconds; a compiler that hangs must not hold up a run.
COMPILE_TIMEOUT_S = 60
# 4 MiB; a larger buffer would stay for ever after one long text.
KEPT_IDS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTables:
    """A model as arrays; can be sent to another process.

    chars, char_pieces: [num_chars] code points that are pieces. char_pairs: [num_pairs, 2] code points that stand
    together in a piece. lefts, rights, merged: [num_merges] pieces. rank_of_piece: [num_pieces], by score, 0 first.
    byte_pieces: [256]. symbol_bytes, symbol_starts [num_symbols + 1], symbol_pieces [num_symbols]: the user-defined
    symbols of several bytes as UTF-8, sorted by their first two bytes, longest first.
    """

    chars: np.ndarray
    char_pieces: np.ndarray
    char_pairs: np.ndarray
    lefts: np.ndarray
    rights: np.ndarray
    merged: np.ndarray
    rank_of_piece: np.ndarray
    byte_pieces: np.ndarray
    symbol_bytes: np.ndarray
    symbol_starts: np.ndarray
    symbol_pieces: np.ndarray


def build_kernel_tables(model: SentencePieceModel) -> KernelTables:
    """Return the tables of a BPE model; raises ConversionError where the kernel would encode otherwise."""
    refuse_rewriting(model)
    if not model.has_byte_fallback:
        raise ConversionError("no byte fallback: unknown characters have no bytes")
    pieces = model.pieces
    symbols = list_symbols(model)
    # A symbol of one character is looked up like any character; only longer ones need a search.
    single_symbols = {text: i for i, text in symbols if len(text) == 1}
    normal = {piece.text: i for i, piece in enumerate(pieces) if piece.type is PieceType.NORMAL and piece.text != NUL}
    chars = {text: i for text, i in normal.items() if len(text) == 1} | single_symbols
    merges = [
        (normal[left], normal[right], i)
        for text, i in normal.items()
        for cut in range(1, len(text))
        if (left := text[:cut]) in normal and (right := text[cut:]) in normal
    ]
    lefts, rights, merged = np.array(merges, dtype=np.int32).reshape(-1, 3).T.copy()
    encoded = sorted(
        ((text.encode(), i) for i, text in symbols if len(text) > 1),
        key=lambda symbol: (symbol[0][:2], -len(symbol[0])),
    )
    byte_pieces = {piece.text: i for i, piece in enumerate(pieces) if piece.type is PieceType.BYTE}
    scores = np.array([piece.score for piece in pieces], dtype=np.float32)
    return KernelTables(
        chars=np.array([ord(char) for char in chars], dtype=np.uint32),
        char_pieces=np.array(list(chars.values()), dtype=np.int32),
        # The kernel cuts words where no piece has two characters side by side. A single symbol always stands alone.
        char_pairs=_list_char_pairs([text for text in normal if not set(text) & set(single_symbols)]),
        lefts=lefts,
        rights=rights,
        merged=merged,
        # Equal scores share a rank: then the leftmost pair is merged first, as sentencepiece does.
        rank_of_piece=np.unique(-scores, return_inverse=True)[1].astype(np.int32),
        byte_pieces=np.array([byte_pieces[f"<0x{byte:02X}>"] for byte in range(256)], dtype=np.int32),
        symbol_bytes=np.frombuffer(b"".join(text for text, _ in encoded), dtype=np.uint8),
        symbol_starts=np.cumsum([0, *(len(text) for text, _ in encoded)]).astype(np.int32),
        symbol_pieces=np.array([i for _, i in encoded], dtype=np.int32),
    )


def _list_char_pairs(texts: Sequence[str]) -> np.ndarray:
    """Every two code points that stand together in a text: [num_pairs, 2] uint32, each pair once."""
    chars = np.frombuffer(NUL.join(texts).encode("utf-32-le"), dtype=np.uint32)
    is_pair = (chars[:-1] != 0) & (chars[1:] != 0)
    pairs = np.unique(chars[:-1][is_pair].astype(np.uint64) << 32 | chars[1:][is_pair])  # numbers sort fast
    return np.stack((pairs >> 32, pairs & 0xFFFFFFFF), axis=1).astype(np.uint32)


class NativeEncoder(Encoder):
    """The ids of `reference`, many times faster; ids are decoded by the reference itself.

    prefix: put before every text that is not empty. Raises PlatformError without a compiled kernel.
    """

    def __init__(self, reference: Encoder, tables: KernelTables, *, prefix: str = ""):
        library = load_kernel()
        if library is None:
            raise PlatformError("tokenizer: the kernel must be compiled, got none. Install a C compiler.")
        self._library = library
        self._reference = reference
        self._prefix = prefix
        self._ids = np.empty(0, dtype=np.int32)
        self._tables = tables  # the kernel reads the symbols where they are
        self._kernel = library.kernel_build(*_list_arguments(tables))
        # The kernel returns a null pointer where malloc fails.
        if not self._kernel:
            raise MemoryError("no memory for the tokenizer's tables")
        # Not __del__: it also runs at the end of the interpreter, while the library is still loaded.
        weakref.finalize(self, library.kernel_free, self._kernel)
        self._spare_bytes = bytes(ctypes.c_int64.in_dll(library, "kernel_spare_bytes").value)
        self._num_spare_ids = ctypes.c_int64.in_dll(library, "kernel_spare_ids").value
        copy_facts(reference, self)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._prefix:
            texts = [self._prefix + text if text else text for text in texts]
        encoded = [text.encode() for text in texts]
        lengths_bytes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths_bytes)))
        # The kernel reads whole words of memory, which may reach past the last text.
        joined = b"".join([*encoded, self._spare_bytes])
        # Before the ids are reserved: the texts are in memory twice.
        del encoded
        ids = self._reserve_ids(int(starts[-1]) + self._num_spare_ids)  # a token has at least one byte
        num_ids = np.empty(len(texts), dtype=np.int64)
        count = self._library.kernel_encode(
            self._kernel, joined, starts.ctypes.data, len(texts), ids.ctypes.data, num_ids.ctypes.data
        )
        if count < 0:
            raise MemoryError("no memory to encode a text")
        # The buffer is used again by the next call.
        return ids[:count].copy(), num_ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._reference.decode(ids)

    def _reserve_ids(self, count: int) -> np.ndarray:
        """A buffer that is used again: fresh memory costs more than the ids of a small batch."""
        if count > KEPT_IDS:
            return np.empty(count, dtype=np.int32)
        if len(self._ids) < count:
            self._ids = np.empty(count, dtype=np.int32)
        return self._ids


def _list_arguments(tables: KernelTables) -> list[ctypes.c_void_p | ctypes.c_int64]:
    """The arguments of kernel_build, in its order."""
    arguments: list[ctypes.c_void_p | ctypes.c_int64] = []
    groups = (
        ((tables.chars, tables.char_pieces), len(tables.chars)),
        ((tables.char_pairs,), len(tables.char_pairs)),
        ((tables.lefts, tables.rights, tables.merged, tables.rank_of_piece), len(tables.lefts)),
        (
            (tables.byte_pieces, tables.symbol_bytes, tables.symbol_starts, tables.symbol_pieces),
            len(tables.symbol_pieces),
        ),
    )
    for arrays, count in groups:
        arguments += [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        arguments.append(ctypes.c_int64(count))
    return arguments


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """Return the kernel that pip has built, else one that is compiled now; None where there is neither."""
    library = _open_library(find_built_kernel()) or _open_library(compile_kernel())
    if library is None:
        return None
    # ctypes takes int for every result, which would cut a pointer to 32 bits.
    library.kernel_build.restype = ctypes.c_void_p
    library.kernel_free.restype = None
    library.kernel_free.argtypes = [ctypes.c_void_p]
    library.kernel_encode.restype = ctypes.c_int64
    library.kernel_encode.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return library


def _open_library(path: Path | None) -> ctypes.CDLL | None:
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:  # built for another machine
        return None


def find_built_kernel() -> Path | None:
    """Return the shared library beside bpe_kernel.c that pip has built from this very file; None if there is none.

    A library that was built before an edit of the file holds the hash of another source.
    """
    source_sha256 = hashlib.sha256(SOURCE_PATH.read_bytes()).hexdigest().encode()
    built = SOURCE_PATH.parent.glob("bpe_kernel.*.so")
    return next((path for path in built if source_sha256 in path.read_bytes()), None)


def compile_kernel() -> Path | None:
    """Return the kernel as a shared library, compiled now unless it is in the user's cache; None if it cannot be."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = SOURCE_PATH.read_bytes()
    # The hash in the name keeps the libraries of other versions and machines apart.
    key = hashlib.sha256(source + repr((platform.machine(), COMPILER_FLAGS)).encode()).hexdigest()[:16]
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_hammer"
    path = cache_dir / f"bpe_kernel-{key}.so"
    if path.is_file():
        return path
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In the same folder, so that the renaming is atomic: several processes may compile at once.
        with tempfile.TemporaryDirectory(dir=cache_dir) as work_dir:
            built = Path(work_dir) / path.name
            command = [*compiler.split(), *COMPILER_FLAGS, "-o", str(built), str(SOURCE_PATH)]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
            built.replace(path)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        return None
    return path
