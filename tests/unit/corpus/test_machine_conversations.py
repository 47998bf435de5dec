"""The conversations of this machine: the same bytes each time, right answers, and questions that are never trained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.corpus.machine_conversations import KINDS_OF_FILES, build_machine_conversations
from megatron_hammer.errors import ConfigError, DataError

NAMES = [f"lib/{first}{second}.py" for first in ("alpha", "beta", "gamma", "delta") for second in "abcdefg"]
NAMES += ["lib/With-Hyphen.py", "lib/a_b.py", "lib/numb3r.py"]


def build(folder: Path, **options: Any) -> dict[str, list[Any]]:
    options = {"num_conversations": 300, "num_preferences": 200, "names": NAMES} | options
    build_machine_conversations(folder, **options)
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.iterdir())
    }


def is_right(question: str, answer: str) -> bool:
    if numbers := re.findall(r"\d+", question):
        return answer.endswith(f"= {sum(map(int, numbers))}.")
    if name := re.fullmatch(r"What is (\w+)(\.\w+)\?", question):
        return answer == f"{name[1]}{name[2]} is {KINDS_OF_FILES[name[2]]}."
    if word := re.fullmatch(r"Repeat the word (\w+)\.", question):
        return answer == word[1]
    greeting, name_given = re.fullmatch(r"(.+), I am (\w+)\.", question).groups()  # type: ignore[union-attr]
    return answer == f"{greeting}, {name_given}! How can I help you?"


def test_answers_are_right_and_rejected_ones_are_not(tmp_path: Path) -> None:
    files = build(tmp_path)
    for record in files["conversations"]:
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        texts = [message["content"] for message in record["messages"]]
        assert all(is_right(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))
    for record in files["preferences"]:
        (question,), (chosen,), (rejected,) = record["prompt"], record["chosen"], record["rejected"]
        assert is_right(question["content"], chosen["content"])
        assert not is_right(question["content"], rejected["content"])
    assert all(is_right(record["question"], record["answer"]) for record in files["held_out"])
    assert {record["kind"] for record in files["held_out"]} == {"greeting", "sum", "repeat", "file"}


def test_held_out_questions_are_not_trained(tmp_path: Path) -> None:
    files = build(tmp_path)
    held_out = {record["question"] for record in files["held_out"]}
    asked = {message["content"] for record in files["conversations"] for message in record["messages"]}
    asked |= {record["prompt"][0]["content"] for record in files["preferences"]}
    assert held_out
    assert not held_out & asked


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = build(tmp_path / "a", seed=3)
    assert build(tmp_path / "b", seed=3, names=reversed(NAMES)) == first
    assert build(tmp_path / "c", seed=4) != first


def test_bad_numbers_and_a_bare_machine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--num-preferences: must be at least 1, got 0"):
        build(tmp_path, num_preferences=0)
    with pytest.raises(DataError, match="names: must hold 20 plain words, got 1"):
        build(tmp_path, names=["one.py"])
    assert list(tmp_path.iterdir()) == []
