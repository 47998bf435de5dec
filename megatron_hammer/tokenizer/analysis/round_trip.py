"""Where decode(encode(text)) differs from the text, place by place, and what kind of loss each place is.

Both texts are walked together. Where they differ, the known kinds of loss are tried in turn, and the walk continues
where both agree again. So time is linear in the length of the text, and no diff of whole documents is needed.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_hammer.corpus.readers import Document

CONTEXT_CHARS = 8
SHOWN_CHARS = 40
# The walk continues where both texts agree in this many characters, within this distance.
AGREEMENT_CHARS = 4
MAX_DISTANCE_CHARS = 64
# Slices of strings are compared in C: much faster than character by character.
_COMPARED_CHARS = 4096

_WHITESPACE = re.compile(r"\s*")
_LINE_ENDS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
# What decoders write for the unknown token: sentencepiece's sign, and the names that Hugging Face decodes to.
_UNKNOWN = re.compile(r" ?\u2047 ?|<unk>|\[UNK\]|<\|unk\|>")
_CONTROL_TOKEN = re.compile(r"<[^<>\s]{1,32}>|\[[A-Z]{2,9}\]")


class TextLossKind(StrEnum):
    LEADING_SPACES = "leading spaces"
    TRAILING_SPACES = "trailing spaces"
    INNER_SPACES = "spaces inside"
    LINE_ENDS = "line ends"
    TABS = "tabs"
    NORMALISED = "normalised characters"
    UNKNOWN = "unknown characters"
    NUL = "NUL"
    INVISIBLE = "control and format characters"
    CONTROL_TOKENS = "control tokens"
    BROKEN_BYTES = "broken bytes"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Loss:
    """Text that came back changed: `before` at `start` (in characters) became `after` at `after_start`."""

    kind: TextLossKind
    start: int
    before: str
    after_start: int
    after: str


@dataclass(slots=True)
class LossClass:
    """One kind of loss over a corpus, and the first place of it: file:line and both texts with what is around it."""

    num_places: int = 0
    num_documents: int = 0
    where: str = ""
    before: str = ""
    after: str = ""


@dataclass(slots=True)
class RoundTripCounts:
    """Losses of one tokenizer over a corpus, by kind; memory does not grow with it."""

    num_documents: int = 0
    num_changed_documents: int = 0
    classes: dict[TextLossKind, LossClass] = field(default_factory=dict)

    def add(self, document: Document, decoded: str) -> None:
        self.num_documents += 1
        if decoded == document.text:
            return
        self.num_changed_documents += 1
        kinds = set()
        for loss in find_losses(document.text, decoded):
            loss_class = self.classes.setdefault(loss.kind, LossClass())
            if not loss_class.num_places:
                loss_class.where = f"{document.source}:{document.line}"
                loss_class.before = _show(document.text, loss.start, loss.before)
                loss_class.after = _show(decoded, loss.after_start, loss.after)
            loss_class.num_places += 1
            # A document is counted once for each kind, however many places it has.
            kinds.add(loss.kind)
        for kind in kinds:
            self.classes[kind].num_documents += 1


def find_losses(before: str, after: str) -> Iterator[Loss]:
    """Every place where `after` differs from `before`, in order; none if and only if both are equal.

    What cannot be aligned again within MAX_DISTANCE_CHARS is one loss up to the end, of kind OTHER.
    """
    i = j = 0
    while True:
        # Always first: also behind a loss, where both texts agree again.
        num_equal = _count_equal(before, i, after, j)
        i, j = i + num_equal, j + num_equal
        if i == len(before) and j == len(after):
            return
        loss = _find_loss(before, i, after, j, num_equal)
        yield loss
        i, j = loss.start + len(loss.before), loss.after_start + len(loss.after)


def _count_equal(before: str, i: int, after: str, j: int) -> int:
    """How many characters are equal, starting at i and j."""
    start = i
    size = _COMPARED_CHARS
    while size:
        if before[i : i + size] == after[j : j + size] and i + size <= len(before) and j + size <= len(after):
            i, j = i + size, j + size
        else:
            size //= 2
    return i - start


def _find_loss(before: str, i: int, after: str, j: int, num_equal: int) -> Loss:
    """The loss at a place where both differ, behind `num_equal` characters that do not; the surest kind first."""
    loss = (
        _find_unknown(before, i, after, j)
        or _find_invisible(before, i, after, j)
        or _find_normalised(before, i, after, j)
        or _find_whitespace(before, i, after, j, num_equal)
        or _find_control_token(before, i, after, j)
    )
    if loss is not None:
        return loss
    before_chars, after_chars = _find_agreement(before, i, after, j)
    removed, added = before[i : i + before_chars], after[j : j + after_chars]
    return Loss(TextLossKind.BROKEN_BYTES if "\ufffd" in added else TextLossKind.OTHER, i, removed, j, added)


def _find_unknown(before: str, i: int, after: str, j: int) -> Loss | None:
    """The text that became the unknown token: it ends where the text after that token continues, which may be short."""
    match = _UNKNOWN.match(after, j)
    if match is None or i == len(before):
        return None
    following = _UNKNOWN.split(after[match.end() : match.end() + AGREEMENT_CHARS], maxsplit=1)[0]
    # At least one character: the unknown token stands for something.
    end = before.find(following, i + 1, i + MAX_DISTANCE_CHARS) if following else len(before)
    if end < 0:  # one unknown token more than there was text, or more losses right behind it
        end = i if before.startswith(following.strip(), i) else i + 1
    return Loss(TextLossKind.UNKNOWN, i, before[i:end], j, match[0])


def _find_invisible(before: str, i: int, after: str, j: int) -> Loss | None:
    """A run of control or format characters (NUL, zero-width space, byte order mark) dropped or made a space."""
    end = i
    while end < len(before) and unicodedata.category(before[end]) in ("Cc", "Cf") and not before[end].isspace():
        end += 1
    if end == i:
        return None
    removed = before[i:end]
    # Some normalisers make a space of a control character. A space that stands behind it anyway is not that.
    becomes_space = after[j : j + 1].isspace() and not before[end : end + 1].isspace()
    kind = TextLossKind.NUL if set(removed) == {"\0"} else TextLossKind.INVISIBLE
    return Loss(kind, i, removed, j, after[j] if becomes_space else "")


def _find_whitespace(before: str, i: int, after: str, j: int, num_equal: int) -> Loss | None:
    """A run of whitespace that changed, from its start, which may lie among the equal characters before."""
    equal = before[i - num_equal : i]
    num_spaces = len(equal) - len(equal.rstrip())
    i, j = i - num_spaces, j - num_spaces
    removed, added = _whitespace_at(before, i), _whitespace_at(after, j)
    if removed == added:
        return None
    return Loss(_name_whitespace(before, i, removed, added), i, removed, j, added)


def _whitespace_at(text: str, start: int) -> str:
    match = _WHITESPACE.match(text, start)
    return match[0] if match else ""


def _name_whitespace(before: str, start: int, removed: str, added: str) -> TextLossKind:
    if [c for c in removed if c in _LINE_ENDS] != [c for c in added if c in _LINE_ENDS]:
        return TextLossKind.LINE_ENDS
    if removed.count("\t") != added.count("\t"):
        return TextLossKind.TABS
    # For instance an ideographic space that became a plain one.
    if not (removed + added).isascii():
        return TextLossKind.NORMALISED
    if start == 0:
        return TextLossKind.LEADING_SPACES
    return TextLossKind.TRAILING_SPACES if start + len(removed) == len(before) else TextLossKind.INNER_SPACES


def _find_normalised(before: str, i: int, after: str, j: int) -> Loss | None:
    """One to four characters whose compatibility form, composition, case or accents changed."""
    # Composition joins a letter with up to three marks.
    for num_chars in range(1, 5):
        removed = before[i : i + num_chars]
        for form in _list_forms(removed):
            if form != removed and after.startswith(form, j):
                return Loss(TextLossKind.NORMALISED, i, removed, j, form)
    return None


def _list_forms(text: str) -> list[str]:
    """What normalisers make of the text; nothing only of accents that stand by themselves."""
    nfkc = unicodedata.normalize("NFKC", text)
    nfd = unicodedata.normalize("NFD", text)
    bare = "".join(c for c in nfd if unicodedata.category(c) != "Mn")
    return [nfkc, nfd, text.lower(), nfkc.lower(), nfkc.casefold(), bare, bare.lower()]


def _find_control_token(before: str, i: int, after: str, j: int) -> Loss | None:
    match = _CONTROL_TOKEN.match(before, i)
    if match is None or not _agree(before, match.end(), after, j):
        return None
    return Loss(TextLossKind.CONTROL_TOKENS, i, match[0], j, "")


def _agree(before: str, i: int, after: str, j: int) -> bool:
    """Whether both texts continue alike, or both end."""
    return i <= len(before) and before[i : i + AGREEMENT_CHARS] == after[j : j + AGREEMENT_CHARS]


def _find_agreement(before: str, i: int, after: str, j: int) -> tuple[int, int]:
    """The fewest characters to skip in each text so that both continue alike; all the rest if they never do."""
    for distance in range(1, MAX_DISTANCE_CHARS + 1):
        # The most characters of the original first: text that is missing is tried before text that was added.
        for num_chars in range(distance, -1, -1):
            if j + distance - num_chars <= len(after) and _agree(
                before, i + num_chars, after, j + distance - num_chars
            ):
                return num_chars, distance - num_chars
    return len(before) - i, len(after) - j


def _show(text: str, start: int, changed: str) -> str:
    """The changed text with a little on both sides, whitespace and what cannot be printed escaped."""
    end = start + min(len(changed), SHOWN_CHARS)
    return repr(text[max(0, start - CONTEXT_CHARS) : end + CONTEXT_CHARS])
