"""Every published format becomes the same messages, and what a record lacks is named with its reason."""

import json
from typing import Any

import pytest

from megatron_hammer.corpus.blocks import BlockKind
from megatron_hammer.data.conversations.formats import (
    Conversation,
    ConversationError,
    parse_record,
    read_conversation,
    read_preference,
)
from tests.helpers.repository import SHARED_DATA, needs_shared_data


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


ONE_TURN = [say("user", "1 + 1?"), say("assistant", "2")]
TWO_TURNS = [*ONE_TURN, say("user", "sure?"), say("assistant", "yes")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
AS_TEXT = {"name": "add", "arguments": '{"a": 1}'}
SHAREGPT = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
RECORDS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "alpaca": ("auto", {"instruction": "1 + 1?", "input": "", "output": "2"}, ONE_TURN),
    "alpaca without input": ("auto", {"instruction": "1 + 1?", "output": "2"}, ONE_TURN),
    "alpaca with input": (
        "alpaca",
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        [say("user", "Add.\n1 and 1"), say("assistant", "2")],
    ),
    "alpaca with nothing but an input": ("auto", {"instruction": "", "input": "1 + 1?", "output": "2"}, ONE_TURN),
    "Dolly": (
        "auto",
        {"instruction": "Add.", "context": "1 and 1", "response": "2", "category": "math"},
        [say("user", "Add.\n1 and 1"), say("assistant", "2")],
    ),
    "an instruction with an input and a response": (
        "question-answer",
        {"instruction": "Add.", "input": "1 and 1", "response": "2"},
        [say("user", "Add.\n1 and 1"), say("assistant", "2")],
    ),
    "OpenOrca": (
        "auto",
        {"system_prompt": "Be brief.", "question": "1 + 1?", "response": "2"},
        [say("system", "Be brief."), *ONE_TURN],
    ),
    "alpaca with history and system": (
        "auto",
        {"instruction": "sure?", "output": "yes", "history": [["1 + 1?", "2"]], "system": "Be brief."},
        [say("system", "Be brief."), *TWO_TURNS],
    ),
    "BELLE's dialogues": (
        "auto",
        {"instruction": "Human:1 + 1?\nAssistant:2\nHuman:sure?\nAssistant:\n", "input": "", "output": "yes"},
        TWO_TURNS,
    ),
    "sharegpt": (
        "auto",
        {"conversations": SHAREGPT, "system": ""},
        ONE_TURN,
    ),
    "sharegpt with calls": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": ""},
                {"from": "gpt", "value": "2"},
            ],
            "tools": "[]",
        },
        [ONE_TURN[0], say("assistant", "", tool_calls=[CALL]), say("tool", ""), ONE_TURN[1]],
    ),
    "messages": ("auto", {"messages": TWO_TURNS, "id": 7}, TWO_TURNS),
    "messages in parts": (
        "messages",
        {"messages": [say("human", [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]), ONE_TURN[1]]},  # type: ignore[arg-type]
        ONE_TURN,
    ),
    "messages with calls of OpenAI": (
        "auto",
        {
            "messages": [
                ONE_TURN[0],
                {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": AS_TEXT}]},
                {"role": "tool", "content": "2", "tool_call_id": "x", "name": None},
            ]
        },
        [ONE_TURN[0], say("assistant", "", tool_calls=[CALL | {"id": "x"}]), say("tool", "2", tool_call_id="x")],
    ),
    "messages with OpenAI's older calls": (
        "auto",
        {"messages": [ONE_TURN[0], say("assistant", "Let me see.", function_call=AS_TEXT)]},
        [ONE_TURN[0], say("assistant", "Let me see.", tool_calls=[CALL])],
    ),
    "messages of system only parts": ("auto", {"messages": [say("system", " "), *ONE_TURN]}, ONE_TURN),
    "tiny-llm-zh": ("auto", {"question": "1 + 1?", "answer": "2"}, ONE_TURN),
    "Firefly": ("question-answer", {"kind": "math", "input": "1 + 1?", "target": "2"}, ONE_TURN),
    "ChatGLM": ("auto", {"prompt": "sure?", "response": "yes", "history": [["1 + 1?", "2"]]}, TWO_TURNS),
    "TRL": ("auto", {"prompt": [ONE_TURN[0]], "completion": [ONE_TURN[1]]}, ONE_TURN),
    "prompts stay as they are": (
        "auto",
        {"prompt": " 1 + 1? Output:", "completion": " 2"},
        [say("user", " 1 + 1? Output:"), say("assistant", " 2")],
    ),
    "Open-Llama": ("open-llama", {"prompt": " 1 + 1? Output:", "completion": " 2"}, ONE_TURN),
    "Open-Llama's sharegpt": ("open-llama", {"conversations": SHAREGPT}, ONE_TURN),
    "Open-Llama's dialogues": ("open-llama", {"instruction": "Human:1 + 1?\nAssistant:", "output": "2"}, ONE_TURN),
    "two users in a row": ("auto", {"messages": [ONE_TURN[0], *ONE_TURN]}, [ONE_TURN[0], *ONE_TURN]),
    "the user last": ("auto", {"messages": TWO_TURNS[:3]}, TWO_TURNS[:3]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_messages(name: str) -> None:
    format_name, fields, messages = RECORDS[name]
    assert read_conversation(fields, format_name) == Conversation(messages)


def test_a_system_text_is_added_where_there_is_none() -> None:
    own = {"messages": [say("system", "Mine."), *ONE_TURN]}
    assert read_conversation(own, system="Be brief.").messages[0] == say("system", "Mine.")
    for fields in ({"messages": ONE_TURN}, {"messages": [say("system", ""), *ONE_TURN]}):
        assert read_conversation(fields, system="Be brief.").messages == [say("system", "Be brief."), *ONE_TURN]


def test_tools_come_along() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for stored in (tools, json.dumps(tools)):
        assert read_conversation({"messages": ONE_TURN, "tools": stored}).tools == tools


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no format": ({"text": "a"}, r"must be of a known format, got the fields \[text\]"),
    "no messages": ({"messages": []}, r"must have a message, got none"),
    "a turn that is no object": ({"messages": ["hi"]}, r"turn 1 must be an object, got a string"),
    "an unknown role": ({"messages": [say("narrator", "x")]}, r"one of the roles system, .*, got 'narrator'"),
    "a list as a role": ({"messages": [{"role": ["user"], "content": "x"}]}, r"turn 1 must have .*, got \['user'\]"),
    "two texts": ({"messages": [say("user", "x", value="y")]}, r'one of "content" and "value", got both'),
    "a part without a text": (
        {"messages": [say("user", [{"type": "text", "text": None}])]},  # type: ignore[arg-type]
        r"turn 1 must have parts with a text, got null",
    ),
    "calls of another kind": ({"messages": [say("assistant", "x", tool_calls=7)]}, r"a list of tool calls, got a num"),
    "a call with a name twice": (
        {"messages": [say("assistant", "", tool_calls=[{"name": "add", "arguments": '{"a": 1, "a": 2}'}])]},
        r'field "a" must occur once in an object, got it again',
    ),
    "a history of another kind": ({"prompt": "a", "response": "b", "history": 5}, r'field "history" must be a list'),
    "a dialogue and an input": (
        {"instruction": "Human: a\nAssistant:", "input": "lost", "output": "b"},
        r'field "input" must be empty beside a dialogue',
    ),
    "two names of a system text": (
        {"system": "a", "system_prompt": "b", "question": "a", "answer": "b"},
        r'one system text, got the field "system" and system_prompt',
    ),
    "no role": ({"messages": [{"content": "x"}]}, r"got None"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"turn 1 must be text, got a list"),
    "a number": ({"question": 1, "answer": "a"}, r'field "question" must be a string, got a number'),
    "a missing output": ({"instruction": "a", "output": None}, r'field "output" must be a string, got null'),
    "a weight": ({"messages": [say("assistant", "x", weight=0)]}, r"turn 1 must have weight 1, got 0"),
    "a loss": ({"messages": [say("assistant", "x", loss=False)]}, r"turn 1 must have loss true, got False"),
    "a mask": ({"messages": [say("assistant", "x", masked=True)]}, r"turn 1 must have masked false, got True"),
    "a surrogate": ({"question": "a\ud800", "answer": "b"}, r"lone surrogate U\+D800"),
    "a surrogate in a turn": ({"messages": [say("user", "\udfff")]}, r"turn 1 must be valid Unicode"),
    "two system texts": ({"messages": [say("system", "a"), *ONE_TURN], "system": "b"}, r"must have one system text"),
    "broken tools": ({"messages": ONE_TURN, "tools": "{"}, r'field "tools" must be JSON'),
    "tools of another kind": ({"messages": ONE_TURN, "tools": [1]}, r'field "tools" must be a list of schemas'),
    "a broken call": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        r"call of turn 1 must be JSON",
    ),
    "a call without a name": (
        {"messages": [say("assistant", "", tool_calls=[{}])]},
        r"turn 1 must call a tool by name",
    ),
    "a call of a text": ({"messages": [say("assistant", "", tool_calls=[{"function": "f"}])]}, r"call a tool by name"),
    "a call with arguments of another name": (
        {"messages": [say("assistant", "", tool_calls=[{"name": "add", "parameters": {"a": 1}}])]},
        r"turn 1 must call a tool by name and arguments, got .*parameters",
    ),
    "a call with a number that JSON has not": (
        {"messages": [say("assistant", "", tool_calls=[{"name": "add", "arguments": '{"a": 1e999}'}])]},
        r"the call of turn 1 must have finite numbers",
    ),
    "a tool with a number that JSON has not": (
        {"messages": ONE_TURN, "tools": '[{"name": "add", "maximum": NaN}]'},
        r'field "tools" must have finite numbers',
    ),
    "a broken history": ({"prompt": "a", "response": "b", "history": [["c"]]}, r"pairs of question and answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named(name: str) -> None:
    fields, match = BAD[name]
    with pytest.raises(ConversationError, match=match) as caught:
        read_conversation(fields)
    assert caught.value.reason == "bad-record"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_an_empty_turn_is_refused(role: str) -> None:
    messages = [message | ({"content": "\n "} if message["role"] == role else {}) for message in ONE_TURN]
    with pytest.raises(ConversationError, match=f"must have a text, got none from the {role}") as caught:
        read_conversation({"messages": messages})
    assert caught.value.reason == "empty-turn"


def test_records_are_parsed() -> None:
    assert parse_record(BlockKind.LINES, b'[{"role": "user"}]') == {"messages": [{"role": "user"}]}
    assert parse_record(BlockKind.ROWS, {"question": "a"}) == {"question": "a"}
    for kind, payload, match in (
        (BlockKind.TEXT, b"hello", "got plain text"),
        (BlockKind.LINES, b'{"a": ', "invalid JSON"),
        (BlockKind.LINES, b"\n", "got a blank line"),
        (BlockKind.LINES, b"3", "must be a JSON object, got a number"),
        (BlockKind.LINES, b'{"messages": [{"content": "a", "content": "b"}]}', 'field "content" must occur once'),
    ):
        with pytest.raises(ConversationError, match=match):
            parse_record(kind, payload)


ANSWERS = [say("assistant", "2")], [say("assistant", "3")]
PREFERENCES: dict[str, dict[str, Any]] = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "1 + 1?"}],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    },
    "texts": {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
    "alpaca": {"instruction": "1 + 1?", "input": "", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": ONE_TURN[:1], "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    "whole": {"chosen": [ONE_TURN[0], *ANSWERS[0]], "rejected": [ONE_TURN[0], *ANSWERS[1]]},
    "whole and named": {"prompt": "1 + 1?", "chosen": ONE_TURN, "rejected": [ONE_TURN[0], *ANSWERS[1]]},
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_has_a_prompt_and_two_answers(name: str) -> None:
    found = read_preference(PREFERENCES[name])
    assert found.prompt == Conversation(ONE_TURN[:1])
    assert (found.chosen, found.rejected) == ANSWERS


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"chosen": None}, 'field "chosen" must be an answer, got null'),
        ({"rejected": []}, 'field "rejected" must be an answer, got a list'),
        ({"chosen": " "}, "turn 1 must have a text"),
        ({"prompt": ONE_TURN}, "prompt must end with a turn that the assistant answers"),
        ({"chosen": ONE_TURN, "rejected": [say("user", "2 + 2?"), ONE_TURN[1]]}, "must follow the same prompt"),
        ({"chosen": ONE_TURN, "rejected": ONE_TURN[:1]}, "must follow the same prompt"),
        ({"prompt": "2 + 2?", "chosen": ONE_TURN, "rejected": [ONE_TURN[0], *ANSWERS[1]]}, "follow the same prompt"),
        ({"chosen": ONE_TURN[1], "rejected": ONE_TURN[0]}, 'field "rejected" must continue the prompt'),
        ({"prompt": 3}, 'field "prompt" must be a string'),
    ],
    ids=str,
)
def test_a_bad_preference_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConversationError, match=match):
        read_preference(PREFERENCES["texts"] | changes)


@needs_shared_data
def test_the_shared_samples_are_read() -> None:
    for name, read in (("alpaca", read_conversation), ("dpo", read_preference)):
        for language in ("en", "zh"):
            records = json.loads((SHARED_DATA / "post_training" / f"{name}_{language}_demo.json").read_bytes())
            assert len([read(fields) for fields in records]) == len(records) >= 300
