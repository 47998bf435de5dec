"""One JSON object to the texts of its fields, or the sentence that says why it has none.

orjson reads what is well formed; Python's own parser, which Megatron-LM's tool uses, decides about the rest.
"""

import json
from collections.abc import Sequence
from typing import Any

import orjson


class BadRecordError(Exception):
    """A record without the texts that were asked for; the message is a fact and a remedy, without file and line."""

    def __init__(self, fact: str, remedy: str = ""):
        super().__init__(f"{fact}. {remedy or 'Repair or remove it'}.")


def decode_json_record(payload: bytes | bytearray, json_keys: Sequence[str]) -> list[str]:
    """Return the text of each key of one JSON object; raises BadRecordError."""
    try:
        fields = orjson.loads(payload)
        texts = [fields[key] for key in json_keys]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        # TypeError: valid JSON that is not an object. This path words the message for all three errors.
        return select_texts(parse_json_object(payload), json_keys)
    if all(type(text) is str for text in texts):
        return texts  # orjson gives valid Unicode only
    return select_texts(fields, json_keys)


def decode_plain_lines(lines: Sequence[bytes], json_key: str) -> list[str] | None:
    """Return the texts of many JSON objects at once; None if one of them needs a closer look."""
    try:
        # Every JSON Lines corpus goes through this line, so nothing else is checked here.
        texts = [orjson.loads(line)[json_key] for line in lines]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return texts if set(map(type, texts)) <= {str} else None


def parse_json_object(payload: bytes | bytearray) -> dict[str, Any]:
    """Parse what orjson refuses too: NaN, huge integers and escaped surrogates are valid; raises BadRecordError."""
    if not payload.strip():
        raise BadRecordError("line must be one JSON object, got a blank line")
    text = decode_utf8(payload.rstrip())
    try:
        fields = json.loads(text)
    # json raises a plain ValueError for an integer beyond sys.int_info.default_max_str_digits digits, and
    # RecursionError for deep nesting.
    except (ValueError, RecursionError) as error:
        cause = str(error)
        if isinstance(error, json.JSONDecodeError):
            cause = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        fact = f"line must be one JSON object, got invalid JSON ({cause})"
        raise BadRecordError(fact, "Repair it, or write one JSON object a line") from error
    if not isinstance(fields, dict):
        raise BadRecordError(f"line must be one JSON object, got {name_of_type(fields)}")
    return fields


def select_texts(fields: dict[str, Any], json_keys: Sequence[str]) -> list[str]:
    """Return the text of each key; raises BadRecordError if one is missing, not a string, or not valid Unicode."""
    return [_select_text(fields, key) for key in json_keys]


def decode_utf8(payload: bytes | bytearray) -> str:
    """Decode, or raise BadRecordError naming the first byte that is not UTF-8."""
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {payload[error.start]:#04x} at offset {error.start}"
        raise BadRecordError(f"text must be UTF-8, got {where}", "Convert the file with iconv") from error


def name_of_type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _select_text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        keys = ", ".join(str(name) for name in fields)
        texts = [name for name, value in fields.items() if isinstance(value, str)]
        # The longest text of a record is most likely the document itself.
        remedy = f"Pass --json-keys {max(texts, key=lambda name: len(fields[name]))}" if texts else ""
        raise BadRecordError(f'field "{key}" is missing, got keys [{keys}]', remedy)
    text = fields[key]
    if isinstance(text, bytes):  # a Parquet column of bytes
        return decode_utf8(text)
    if not isinstance(text, str):
        raise BadRecordError(f'field "{key}" must be a string, got {name_of_type(text)}')
    try:
        # JSON may escape one half of a surrogate pair. Python reads it, but no UTF-8 can be written from it.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise BadRecordError(f'field "{key}" must be valid Unicode, got the lone surrogate {surrogate}') from error
    return text
