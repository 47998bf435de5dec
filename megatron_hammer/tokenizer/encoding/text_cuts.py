"""Safe boundaries of a text: its parts, encoded one by one, give the ids of the whole.

A BPE merge joins two neighbours whose concatenation is a piece. If no piece contains the two characters at a boundary
next to each other, no merge and no user-defined symbol can span the boundary, so the two sides do not affect each
other. This bounds the memory of a long document. Only SentencePiece BPE models whose normalisation looks at one
character at a time are cut; `build_text_cutter` returns None for others.
"""

from collections.abc import Iterator

import numpy as np

from megatron_hammer.tokenizer.encoding.sentencepiece_model import WHITESPACE_SYMBOL, PieceType, SentencePieceModel

# Long enough that cutting costs nothing, short enough for the buffers of an encoder.
MAX_PART_CHARS = 256 * 1024
_WINDOW_CHARS = 1024
# Unicode ends at U+10FFFF, which takes 21 bits.
_CODE_POINT_BITS = np.uint64(21)


class TextCutter:
    """Cuts long texts at boundaries that no piece can span.

    inner_pairs: the pairs of neighbouring code points of all pieces, left << 21 | right, sorted, [num_pairs] uint64.
    has_dummy_prefix: every part gets a leading space from the model, so a cut drops one, and is made at a space only.
    known_chars: the pieces of one code point, sorted uint64; two neighbours outside it become one unknown token.
    None with byte fallback, which knows every character.
    """

    def __init__(self, inner_pairs: np.ndarray, *, has_dummy_prefix: bool, known_chars: np.ndarray | None):
        self._inner_pairs = inner_pairs
        self._has_dummy_prefix = has_dummy_prefix
        self._known_chars = known_chars

    def cut(self, text: str, max_part_chars: int = MAX_PART_CHARS) -> Iterator[str]:
        """Yield parts of about `max_part_chars`; a stretch without a safe boundary stays whole, however long."""
        start = 0
        while len(text) - start > max_part_chars:
            boundary = self._find_boundary(text, start, start + max_part_chars)
            # The rest has no safe boundary, so it is one part.
            if boundary is None:
                break
            yield text[start:boundary]
            start = boundary + self._has_dummy_prefix
        yield text[start:]

    def _find_boundary(self, text: str, start: int, target: int) -> int | None:
        """The last safe boundary in the window before `target`, else the first after it, else None."""
        # Only a window is searched: a boundary is usually near, and a scan of the whole text would take longer.
        window_start = max(start, target - _WINDOW_CHARS)
        if len(boundaries := self.find_boundaries(text[window_start : target + 1])):
            return window_start + int(boundaries[-1])
        # One character more than the step, so that the pair at the border of two windows is looked at.
        for window_start in range(target, len(text), _WINDOW_CHARS):
            if len(boundaries := self.find_boundaries(text[window_start : window_start + _WINDOW_CHARS + 1])):
                return window_start + int(boundaries[0])
        return None

    def find_boundaries(self, text: str) -> np.ndarray:
        """Every safe boundary as the number of characters before it: ascending int64 in 1 ... len(text) - 1."""
        chars = _code_points(text)
        is_space = chars == ord(" ")
        chars[is_space] = ord(WHITESPACE_SYMBOL)
        is_safe = ~_is_member(chars[:-1] << _CODE_POINT_BITS | chars[1:], self._inner_pairs)
        if self._known_chars is not None:
            # Two unknown characters in a row become one token, so there is no cut between them.
            is_known = _is_member(chars, self._known_chars)
            is_safe &= is_known[:-1] | is_known[1:]
        if self._has_dummy_prefix:
            is_safe &= is_space[1:]
            is_safe[-1:] = False  # the part after the space would be empty, and an empty part gets no prefix
        return np.flatnonzero(is_safe) + 1


def build_text_cutter(model: SentencePieceModel) -> TextCutter | None:
    """Return the cutter of `model`, or None if its ids can depend on more than the neighbouring characters."""
    if (
        model.model_type != "bpe"
        or model.precompiled_charsmap  # rewrites sequences of characters
        or model.removes_extra_whitespaces
        or model.treats_whitespace_as_suffix
        or not model.escapes_whitespaces
    ):
        return None
    # Names of control and byte tokens, and NUL between pieces, only cost the boundaries at pairs that they add.
    chars = _code_points("\0".join([piece.text for piece in model.pieces]).replace(" ", WHITESPACE_SYMBOL))
    return TextCutter(
        np.unique(chars[:-1] << _CODE_POINT_BITS | chars[1:]),
        has_dummy_prefix=model.has_dummy_prefix,
        known_chars=None if model.has_byte_fallback else np.unique(_code_points(_join_single_chars(model))),
    )


def _join_single_chars(model: SentencePieceModel) -> str:
    types = (PieceType.NORMAL, PieceType.USER_DEFINED)
    return "".join(piece.text for piece in model.pieces if piece.type in types and len(piece.text) == 1)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.uint64)


def _is_member(values: np.ndarray, sorted_members: np.ndarray) -> np.ndarray:
    # searchsorted returns the length for a value above all members.
    positions = np.minimum(np.searchsorted(sorted_members, values), len(sorted_members) - 1)
    return sorted_members[positions] == values
