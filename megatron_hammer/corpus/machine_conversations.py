"""Small conversations made on the spot, for a chat model of a few million parameters: nothing is downloaded.

Greetings, sums, words to repeat, and questions about the kind of a file, with names of files that lie on this machine.
It is for demonstrations and tests: a domain that such a model can learn in minutes, with a right answer to every
question. The questions that are held out are never asked in the training conversations. The same machine and seed give
the same bytes.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron_hammer.corpus.machine_text import find_machine_text
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.files.publish import publish_files

KINDS_OF_FILES = {
    ".py": "a Python program",
    ".txt": "a plain text",
    ".md": "a text in Markdown",
    ".json": "data in JSON",
    ".html": "a web page",
    ".c": "a program in C",
    ".sh": "a shell script",
    ".csv": "a table",
    ".png": "a picture",
    ".log": "a log",
}
NAMES = (
    *("Ada", "Alan", "Anna", "Ben", "Carl", "Dora", "Emma", "Eva", "Felix", "Grace", "Hana", "Ivan", "Jan", "Kim"),
    *("Lea", "Lin", "Max", "Mia", "Nina", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Uwe", "Wei", "Zoe"),
)
LARGEST_TERM = 12
MIN_STEMS = 20
HELD_OUT_RATIO = 0.1
REFUSAL = "I do not know."


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with its answer, and an answer that is worse: wrong, or without an end."""

    kind: str
    question: str
    answer: str
    worse: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineConversations:
    """How much `build_machine_conversations` wrote."""

    num_conversations: int
    num_preferences: int
    num_held_out: int


def build_machine_conversations(
    output_dir: Path, *, num_conversations: int, num_preferences: int, seed: int = 1234, names: Iterable[str] = ()
) -> MachineConversations:
    """Write conversations.jsonl, preferences.jsonl and held_out.jsonl into a folder; each appears complete.

    conversations: {"messages"} of one or two questions. preferences: {"prompt", "chosen", "rejected"}, in messages.
    held_out: {"kind", "question", "answer"}. names: of files, whose stems are used; those of this machine by default.
    Raises DataError for too few names, and ConfigError for a number below 1.
    """
    for flag, number in (("--num-conversations", num_conversations), ("--num-preferences", num_preferences)):
        if number < 1:
            raise ConfigError(f"{flag}: must be at least 1, got {number}. Raise it.")
    draw = random.Random(seed)
    exchanges = list_exchanges(_list_stems(names or find_machine_text()), draw)
    draw.shuffle(exchanges)
    held_out, trained = _split(exchanges)
    # Kinds have very different numbers of questions; each is asked as often as the others.
    kinds = [[one for one in trained if one.kind == kind] for kind in sorted({one.kind for one in trained})]

    def ask() -> Exchange:
        return draw.choice(draw.choice(kinds))

    conversations = [_converse([ask() for _ in range(draw.choice((1, 1, 2)))]) for _ in range(num_conversations)]
    preferences = [_prefer(ask()) for _ in range(num_preferences)]
    questions = [{"kind": one.kind, "question": one.question, "answer": one.answer} for one in held_out]
    publish_files(
        {
            output_dir / "conversations.jsonl": _to_lines(conversations),
            output_dir / "preferences.jsonl": _to_lines(preferences),
            output_dir / "held_out.jsonl": _to_lines(questions),
        }
    )
    return MachineConversations(
        num_conversations=len(conversations), num_preferences=len(preferences), num_held_out=len(questions)
    )


def list_exchanges(stems: Sequence[str], draw: random.Random) -> list[Exchange]:
    """Every question that the conversations are made of, once."""
    exchanges = [*_list_greetings(), *_list_sums(draw)]
    for stem in stems:
        exchanges += _list_words(stem, draw.choice(stems))
        exchanges += _list_files(stem, draw)
    return exchanges


def _list_greetings() -> Iterable[Exchange]:
    for greeting in ("Hello", "Hi", "Good morning", "Good evening"):
        for name in NAMES:
            answer = f"{greeting}, {name}! How can I help you?"
            yield Exchange("greeting", f"{greeting}, I am {name}.", answer, f"{answer} {answer} {answer}")


def _list_sums(draw: random.Random) -> Iterable[Exchange]:
    for first in range(LARGEST_TERM + 1):
        for second in range(LARGEST_TERM + 1):
            answer = f"{first} + {second} = {first + second}."
            wrong = f"{first} + {second} = {first + second + draw.choice((-3, -2, 2, 3))}."
            for question in (f"What is {first} + {second}?", f"Please add {first} and {second}."):
                yield Exchange("sum", question, answer, wrong)


def _list_words(stem: str, other: str) -> Iterable[Exchange]:
    yield Exchange("repeat", f"Repeat the word {stem}.", stem, f"{other} {other} {other}")


def _list_files(stem: str, draw: random.Random) -> Iterable[Exchange]:
    for suffix in draw.sample(list(KINDS_OF_FILES), 3):
        answer = f"{stem}{suffix} is {KINDS_OF_FILES[suffix]}."
        yield Exchange("file", f"What is {stem}{suffix}?", answer, REFUSAL)


def _list_stems(names: Iterable[str]) -> list[str]:
    """Short plain words from the names of files, sorted: folders are listed in the order of the file system."""
    stems = {Path(name).stem for name in names}
    words = sorted(stem for stem in stems if stem.isascii() and stem.isalpha() and stem.islower() and len(stem) <= 12)
    if len(words) < MIN_STEMS:
        raise DataError(
            f"names: must hold {MIN_STEMS} plain words, got {len(words)}. Install Python with its library's sources."
        )
    return words


def _split(exchanges: Sequence[Exchange]) -> tuple[list[Exchange], list[Exchange]]:
    """The held-out tenth of every kind, and the rest."""
    by_kind: dict[str, list[Exchange]] = {}
    for one in exchanges:
        by_kind.setdefault(one.kind, []).append(one)
    held_out = [one for group in by_kind.values() for one in group[: max(1, int(len(group) * HELD_OUT_RATIO))]]
    questions = {one.question for one in held_out}
    return held_out, [one for one in exchanges if one.question not in questions]


def _converse(exchanges: Sequence[Exchange]) -> dict[str, list[dict[str, str]]]:
    turns = [message for one in exchanges for message in (_say("user", one.question), _say("assistant", one.answer))]
    return {"messages": turns}


def _prefer(one: Exchange) -> dict[str, list[dict[str, str]]]:
    answers = {"chosen": [_say("assistant", one.answer)], "rejected": [_say("assistant", one.worse)]}
    return {"prompt": [_say("user", one.question)], **answers}


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _to_lines(records: Iterable[object]) -> bytes:
    return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)
