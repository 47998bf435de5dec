"""Random text that a tokenizer might treat differently from ordinary text; the seed makes it the same in every run."""

import random
from collections.abc import Sequence

_ALPHABETS = (
    "ab c",
    "  \n\t\r",
    "0123456789.!?",
    "。，的一是了",
    "\0\x01\x7f ab",
    "👩\u200d🦀🇨🇳\ufe0fe\u0301\u0323",
    "▁ x▁",
    "<s>/unk0xAF",
    "ＦＵＬＬ　ｗｉｄｔｈ½ﬁ㎏",
)
_LAST_CODE_POINT = 0x10FFFF


def build_hostile_texts(pieces: Sequence[str], *, num_texts: int, seed: int) -> list[str]:
    """Mixtures of vocabulary pieces, runs, any code points but surrogates, and pieces turned about."""
    draw = random.Random(seed)
    return ["".join(_build_part(pieces, draw) for _ in range(draw.randint(1, 9))) for _ in range(num_texts)]


def _build_part(pieces: Sequence[str], draw: random.Random) -> str:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(pieces)
    if kind == 1:
        return "".join(draw.choices(draw.choice(_ALPHABETS), k=draw.randint(1, 30)))
    if kind == 2:
        last = draw.choice((0x7F, 0x3000, 0xA000, _LAST_CODE_POINT))
        code_points = (draw.randint(0, last) for _ in range(draw.randint(1, 10)))
        return "".join(chr(code_point) for code_point in code_points if not 0xD800 <= code_point < 0xE000)
    piece = draw.choice(pieces)
    cut = draw.randint(0, len(piece))
    return piece[cut:] + piece[:cut]
