"""Which script a document is written in, and the units in which its fertility is counted.

Only letters count, so that markup, digits and punctuation do not decide. Code is Latin: between code and technical
prose no share of symbols tells reliably, so give code as an input of its own to see its figures.
"""

import re
from enum import StrEnum

_HAN = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a"
_SYLLABLES = "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"  # kana and Hangul

_HAN_RUN = re.compile(f"[{_HAN}]+")
_LATIN_RUN = re.compile(f"[{_LATIN}]+")
_SYLLABLE_RUN = re.compile(f"[{_SYLLABLES}]+")
_OTHER_RUN = re.compile(rf"(?:(?![{_HAN}{_LATIN}{_SYLLABLES}])[^\W\d_])+")
# Runs, not single characters: findall then makes far fewer strings.
_NOT_SPACE = re.compile(r"\S+")


class Script(StrEnum):
    """The groups of documents: Han letters (Chinese), Latin letters (English, code), any other letters, none."""

    HAN = "Han"
    LATIN = "Latin"
    OTHER = "other"
    NONE = "none"


# Latin words are separated by whitespace; some of the other scripts put none between words.
UNITS = {Script.HAN: "character", Script.LATIN: "word", Script.OTHER: "character", Script.NONE: "character"}


def detect_script(text: str) -> Script:
    """The script with the most units; of two with equally many, the first in the order Han, Latin, other.

    Units: each Han character, each run of Latin letters, each kana or Hangul character, each run of other letters.
    """
    counts = {
        Script.HAN: sum(map(len, _HAN_RUN.findall(text))),
        Script.LATIN: len(_LATIN_RUN.findall(text)),
        Script.OTHER: sum(map(len, _SYLLABLE_RUN.findall(text))) + len(_OTHER_RUN.findall(text)),
    }
    best = max(counts, key=lambda script: counts[script])
    return best if counts[best] else Script.NONE


def count_units(text: str, script: Script) -> int:
    """Words between whitespace for Latin, else characters that are not whitespace."""
    if UNITS[script] == "word":
        return len(text.split())
    return sum(map(len, _NOT_SPACE.findall(text)))
