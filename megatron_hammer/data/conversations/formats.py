"""Records of instruction data as conversations: the formats in which such data are published.

A reader takes one JSON object and returns messages with the roles system, user, assistant and tool, and says what is
wrong with a record that it cannot take as it is. No text is trimmed or rewritten, except where a format says so below.
Not here: files (corpus/), and what a template makes of the messages (post_training/templates/).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_hammer.corpus.blocks import BlockKind
from megatron_hammer.corpus.json_records import BadRecordError, name_of_type, parse_json_object

Message = dict[str, Any]
Fields = Mapping[str, Any]
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "function_call"),
    "tool": ("tool", "observation", "function"),
}
ROLE_BY_NAME = {name: role for role, names in ROLES.items() for name in names}
TURN_KEYS = ("messages", "conversations", "conversation")
# By which OpenAI, ms-swift, axolotl and torchtune keep an answer from being learned, and what they are where it is.
WEIGHTS = {"weight": 1, "loss": True, "train": True, "training": True, "trainable": True, "masked": False}
CALL_KEYS = ("id", "type", "index")  # what templates read of a call beside its function
SYSTEM_KEYS = ("system", "system_prompt")
# Of one question and one answer; the first three are also those of tiny-llm-zh, Open-Llama and Firefly.
PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("input", "target"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "response"),
    ("instruction", "response"),
)
# BELLE and Open-Llama write a dialogue into one instruction, which ends where the answer begins.
SPEAKER = re.compile(r"(?:^|\n)(Human|Assistant):")
OPEN_LLAMA_SUFFIX = "Output:"


class ConversationError(BadRecordError):
    """A conversation that cannot be used; `reason` is the name under which it is counted."""

    def __init__(self, reason: str, fact: str, remedy: str = ""):
        super().__init__(fact, remedy)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: `role`, `content` and what else a template reads, as in transformers. tools: schemas, or None."""

    messages: Sequence[Message]
    tools: Sequence[Message] | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation up to the assistant's turn, and two continuations of it."""

    prompt: Conversation
    chosen: Sequence[Message]
    rejected: Sequence[Message]


def parse_record(kind: BlockKind, payload: bytes | bytearray | Fields) -> Fields:
    """Return the fields of a record of a corpus block; a line may also be the list of messages itself."""
    if isinstance(payload, Mapping):
        # A Parquet file has every column in every row.
        return {name: value for name, value in payload.items() if value is not None}
    if kind is BlockKind.TEXT:
        raise _bad("file must hold JSON or Parquet records, got plain text")
    try:
        orjson.loads(payload)
    except orjson.JSONDecodeError:
        try:
            parse_json_object(payload)
        except BadRecordError as error:
            raise ConversationError("bad-record", str(error).split(". ")[0]) from error
    # orjson is strict; this one can tell that a name occurs twice, of which every parser drops one.
    fields = json.loads(payload, object_pairs_hook=_refuse_repeats)
    if isinstance(fields, list):
        return {"messages": fields}
    if not isinstance(fields, dict):
        raise _bad(f"record must be a JSON object, got {name_of_type(fields)}")
    return fields


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _bad(f"field {json.dumps(repeated)} must occur once in an object, got it again", "Keep one of them")
    return fields


def read_conversation(fields: Fields, format_name: str = "auto", *, system: str | None = None) -> Conversation:
    """Return the conversation of a record. format_name: of FORMATS, or auto: by the names of its fields.

    system: what conversations without a system message begin with. Raises ConversationError, with its reason.
    """
    messages = FORMATS[_find_format(fields) if format_name == "auto" else format_name](fields)
    return _complete(messages, fields, system)


def read_preference(fields: Fields, *, system: str | None = None) -> Preference:
    """Return a prompt with its chosen and its rejected answer: texts, messages, or whole conversations of both.

    Raises ConversationError, with its reason.
    """
    chosen, rejected = (_read_answer(fields, name) for name in ("chosen", "rejected"))
    turns = next((fields[key] for key in (*TURN_KEYS, "prompt") if isinstance(fields.get(key), list)), None)
    prompt = _read_turns(turns) if turns is not None else _read_question(fields)
    if chosen[0]["role"] != "assistant":  # both answers hold the prompt, which may stand beside them once more
        prompt, chosen, rejected = _split_prompt(prompt, chosen, rejected)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise _bad(f'field "{name}" must continue the prompt with a turn of the assistant')
        _refuse_empty_turns(answer)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise _bad("prompt must end with a turn that the assistant answers, got none")
    return Preference(_complete(prompt, fields, system), chosen, rejected)


def _split_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt that both conversations begin with, and what each says after it. prompt: beside them, or nothing."""
    both = zip(chosen, rejected, strict=False)
    # Of two equal conversations the last turn is the answer.
    num_common = next((place for place, (one, other) in enumerate(both) if one != other), len(chosen) - 1)
    answers = chosen[num_common:], rejected[num_common:]
    is_continued = all(answer and answer[0]["role"] == "assistant" for answer in answers)
    if not is_continued or (prompt and chosen[:num_common][-len(prompt) :] != prompt):
        raise ConversationError("prompts-differ", "both answers must follow the same prompt, got different ones")
    return chosen[:num_common], *answers


def _find_format(fields: Fields) -> str:
    turns = next((fields[key] for key in TURN_KEYS if isinstance(fields.get(key), list)), None)
    if turns is not None:
        return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "messages"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if _find_pair(fields) is not None:
        return "question-answer"
    raise _bad(f"record must be of a known format, got the fields [{', '.join(map(str, fields))}]", "Pass --format")


def _read_messages(fields: Fields) -> list[Message]:
    return _read_turns(_require(fields, TURN_KEYS, list))


def _read_alpaca(fields: Fields) -> list[Message]:
    output = _require(fields, ("output",), str)
    instruction = _require(fields, ("instruction",), str)
    if instruction.startswith("Human:") and instruction.rstrip().endswith("Assistant:"):
        if more := next((name for name in ("input", "history") if fields.get(name)), None):
            raise _bad(f'field "{more}" must be empty beside a dialogue in the instruction, got one', "Move it there")
        return [*_split_dialogue(instruction), _say("assistant", output)]
    return [*_read_history(fields), *_read_question(fields), _say("assistant", output)]


def _read_pair(fields: Fields) -> list[Message]:
    pair = _find_pair(fields)
    if pair is None:
        raise _bad(f"record must have a question and an answer, got the fields [{', '.join(map(str, fields))}]")
    if all(isinstance(fields[name], list) for name in pair):  # as TRL has them
        return [message for name in pair for message in _read_turns(fields[name])]
    question, answer = (_require(fields, (name,), str) for name in pair)
    asked = _read_question(fields) if pair[0] == "instruction" else [_say("user", question)]
    return [*_read_history(fields), *asked, _say("assistant", answer)]


def _read_open_llama(fields: Fields) -> list[Message]:
    """Pairs as Open-Llama cleans them: without "Output:" behind the prompt, and without space around both."""
    if "instruction" in fields:
        return _read_alpaca(fields)
    if any(key in fields for key in TURN_KEYS):
        return _read_messages(fields)
    messages = _read_pair(fields)
    for message in messages:
        message["content"] = message["content"].removesuffix(OPEN_LLAMA_SUFFIX).strip()
    return messages


FORMATS: dict[str, Callable[[Fields], list[Message]]] = {
    "alpaca": _read_alpaca,
    "sharegpt": _read_messages,
    "messages": _read_messages,
    "question-answer": _read_pair,
    "open-llama": _read_open_llama,
}


def _complete(messages: list[Message], fields: Fields, system: str | None) -> Conversation:
    """Add the system text, and refuse turns without text."""
    names = [name for name in SYSTEM_KEYS if fields.get(name)]
    own = _require(fields, names, str) if names else None
    if len(names) > 1 or (own is not None and messages[:1] and messages[0]["role"] == "system"):
        other = names[1:2] or ["a system message"]
        raise _bad(f'record must have one system text, got the field "{names[0]}" and {other[0]}')
    text = own or system
    # An empty system text says nothing; templates would still write a turn for it.
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if text and not (messages and messages[0]["role"] == "system"):
        messages = [_say("system", text), *messages]
    if not messages:
        raise _bad("conversation must have a message, got none")
    _refuse_empty_turns(messages)
    return Conversation(messages, _read_tools(fields))


def _refuse_empty_turns(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        # The result of a tool may be nothing.
        if message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise ConversationError(
                "empty-turn", f"turn {number} must have a text, got none from the {message['role']}", "Remove the turn"
            )


def _read_turns(turns: Any) -> list[Message]:
    return [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise _bad(f"turn {number} must be an object, got {name_of_type(turn)}")
    if twice := next((pair for pair in (("role", "from"), ("content", "value")) if turn.keys() >= {*pair}), None):
        raise _bad(f'turn {number} must have one of "{twice[0]}" and "{twice[1]}", got both', "Keep one of them")
    name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(name, str) or name not in ROLE_BY_NAME:
        raise _bad(f"turn {number} must have one of the roles {', '.join(ROLE_BY_NAME)}, got {name!r}")
    is_answer = ROLE_BY_NAME[name] == "assistant"
    if unlearned := [key for key, value in WEIGHTS.items() if is_answer and turn.get(key) not in (None, value)]:
        fact = f"turn {number} must have {unlearned[0]} {json.dumps(WEIGHTS[unlearned[0]])}"
        raise _bad(f"{fact}, got {turn[unlearned[0]]}: every answer is learned", "Leave it out")
    message: Message = {"role": ROLE_BY_NAME[name], "content": _read_content(content, number)}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    calls = calls or ([_parse(content, dict, number)] if name == "function_call" else [])
    if not isinstance(calls, list):
        raise _bad(f"turn {number} must have a list of tool calls, got {name_of_type(calls)}")
    if calls:
        message["tool_calls"] = [_read_call(call, number) for call in calls]
        message["content"] = "" if name == "function_call" else message["content"]
    # What else templates may read, such as reasoning_content and the name of a tool.
    known = ("role", "from", "content", "value", "tool_calls", "function_call", *WEIGHTS)
    return message | {key: value for key, value in turn.items() if key not in known and value is not None}


def _read_content(content: Any, number: int) -> str:
    """A text; or its parts, as in OpenAI's format."""
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        if wrong := [part.get("text") for part in parts if not isinstance(part.get("text"), str)]:
            raise _bad(f"turn {number} must have parts with a text, got {name_of_type(wrong[0])}")
        content = "".join(part["text"] for part in parts)
    if content is not None and not isinstance(content, str):
        raise _bad(f"turn {number} must be text, got {name_of_type(content)} or parts of another type than text")
    return _require_unicode(content or "", f"turn {number}")


def _read_call(call: Any, number: int) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        function = {}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse(arguments, dict, number)
    # Under another name, such as `parameters`, the arguments would be lost.
    is_complete = "arguments" in function or not function.keys() - {"name", *CALL_KEYS}
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict) or not is_complete:
        raise _bad(f"turn {number} must call a tool by name and arguments, got {str(call)[:60]}")
    _require_finite(arguments, f"the call of turn {number}")
    others = {key: call[key] for key in CALL_KEYS if call.get(key) is not None}
    return {"type": "function"} | others | {"function": {"name": function["name"], "arguments": arguments}}


def _read_tools(fields: Fields) -> list[Message] | None:
    tools = fields.get("tools")
    if isinstance(tools, str) and tools:
        tools = _parse(tools, list, None)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _bad(f'field "tools" must be a list of schemas, got {name_of_type(tools)}')
    _require_finite(tools, 'field "tools"')
    return tools or None


def _read_answer(fields: Fields, name: str) -> list[Message]:
    answer = fields.get(name)
    if isinstance(answer, str):
        return [_say("assistant", _require_unicode(answer, f'field "{name}"'))]
    turns = [answer] if isinstance(answer, dict) else answer
    if not isinstance(turns, list) or not turns:
        raise _bad(f'field "{name}" must be an answer, got {name_of_type(answer)}')
    return _read_turns(turns)


def _read_question(fields: Fields) -> list[Message]:
    """The user's part of a record without turns; alpaca's input and Dolly's context stand below the instruction."""
    name = next((name for name in ("instruction", "prompt", "question", "query") if name in fields), None)
    if name is None:
        return []
    additions = [below for below in ("input", "context") if name == "instruction" and fields.get(below)]
    texts = [_require(fields, (one,), str) for one in (name, *additions)]
    return [_say("user", "\n".join(filter(None, texts)))]


def _read_history(fields: Fields) -> list[Message]:
    messages = []
    for number, pair in enumerate(_require(fields, ("history",), list) if fields.get("history") else [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _bad(f'field "history" must hold pairs of question and answer, got another entry {number}')
        messages += [
            _say(role, _read_content(text, number)) for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages


def _split_dialogue(text: str) -> list[Message]:
    """The turns of "Human: ... Assistant: ... Human: ... Assistant:", without the last, which has no text."""
    parts = SPEAKER.split(text)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [_say(roles[name], said) for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _find_pair(fields: Fields) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if all(name in fields for name in pair)), None)


def _say(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _require(fields: Fields, names: Sequence[str], kind: type) -> Any:
    """The value of the first of these fields that the record has."""
    name = next((name for name in names if name in fields), None)
    if name is None:
        raise _bad(f'field "{names[0]}" is missing, got [{", ".join(map(str, fields))}]', "Pass another --format")
    if not isinstance(fields[name], kind):
        wanted = "a list" if kind is list else "a string"
        raise _bad(f'field "{name}" must be {wanted}, got {name_of_type(fields[name])}')
    return _require_unicode(fields[name], f'field "{name}"') if kind is str else fields[name]


def _require_unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(f"{where} must be valid Unicode, got the lone surrogate U+{ord(text[error.start]):04X}") from error
    return text


def _parse(text: Any, kind: type, number: int | None) -> Any:
    where = 'field "tools"' if number is None else f"the call of turn {number}"
    try:
        value = json.loads(text, object_pairs_hook=_refuse_repeats)
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad(f"{where} must be JSON, got {str(text)[:60]!r}") from error
    if not isinstance(value, kind):
        raise _bad(f"{where} must be {name_of_type(kind())}, got {name_of_type(value)}")
    return value


def _require_finite(value: Any, where: str) -> None:
    """Python's parser reads NaN and 1e999, which a template would write as NaN and Infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise _bad(f"{where} must have finite numbers, got NaN or Infinity") from error
    except RecursionError as error:
        raise _bad(f"{where} must be nested less deeply, got too many levels") from error


def _bad(fact: str, remedy: str = "") -> ConversationError:
    return ConversationError("bad-record", fact, remedy)
