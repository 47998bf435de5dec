"""Read JSON and TOML into typed objects; every field that does not fit is reported at once, in one sentence each.

`kind` is what the content must be: a frozen dataclass, or a type such as `dict[str, int]`; limits are written as
`Annotated[float, annotated_types.Gt(0)]`. Types are strict: neither a text nor a truth value is accepted as a number.
Dataclasses and lists of any depth are built by pydantic, which is loaded at the first call: it takes 0.1 s.
Not here: corpora, whose records are parsed by the million (corpus/json_records.py).
"""

import functools
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hammer.errors import DataError, HammerError
from megatron_hammer.files.read import read_bytes

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

MAX_VALUE_CHARS = 60
# By pydantic's names of errors; its own words for the others begin with "Input should".
REQUIREMENTS = {
    "missing": "must be given",
    "extra_forbidden": "must be a known field",
    "unexpected_keyword_argument": "must be a known field",  # of a dataclass
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "dataclass_type": "must be a table",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "string_too_short": "must have a length of at least {min_length}",
    "too_short": "must have a length of at least {min_length}",
    "value_error": "{error}",
}


@dataclass(frozen=True, slots=True)
class FormatVersion:
    """The version of a file. It is read first, because another version may have other fields."""

    format_version: int


def read_json[T](
    path: Path, kind: type[T], *, remedy: str, raises: type[HammerError] = DataError, allows_unknown: bool = True
) -> T:
    """Return the content of a JSON file. Raises `raises` with `<path>: <field> must ..., got <value>. <remedy>`.

    allows_unknown: whether fields that `kind` does not have are left out; otherwise each is a problem.
    """
    content = read_bytes(path, raises=raises)
    return parse_json(content, kind, where=str(path), remedy=remedy, raises=raises, allows_unknown=allows_unknown)


def read_toml[T](
    path: Path, kind: type[T], *, remedy: str, raises: type[HammerError] = DataError, allows_unknown: bool = True
) -> T:
    """Return the content of a TOML file; see `read_json`."""
    try:
        tables = tomllib.loads(read_bytes(path, raises=raises).decode())
    except ValueError as error:
        raise raises(f"{path}: file must be TOML, got: {error}. {remedy}") from error
    return validate(tables, kind, where=str(path), remedy=remedy, raises=raises, allows_unknown=allows_unknown)


def validate[T](
    value: Any,
    kind: type[T],
    *,
    where: str,
    remedy: str,
    raises: type[HammerError] = DataError,
    allows_unknown: bool = True,
) -> T:
    """Return tables, lists, texts and numbers as a typed object; see `read_json`. where: their name in messages."""
    # By way of JSON, because strict types know lists of Python from tuples, but in JSON there is one kind of list.
    # default=str: TOML has dates and times, which JSON does not have.
    content = json.dumps(value, default=str)
    return parse_json(content, kind, where=where, remedy=remedy, raises=raises, allows_unknown=allows_unknown)


def parse_json[T](
    content: bytes | str,
    kind: type[T],
    *,
    where: str,
    remedy: str,
    raises: type[HammerError] = DataError,
    allows_unknown: bool = True,
) -> T:
    """Return a JSON text as a typed object; see `read_json`. where: a file, or `file:line` for a line of one."""
    from pydantic import ValidationError

    adapter: TypeAdapter[T] = _build_adapter(kind)  # type: ignore[arg-type]  # every type is hashable
    try:
        return adapter.validate_json(content, strict=True, extra="ignore" if allows_unknown else "forbid")
    except ValidationError as error:
        # pydantic collects the errors of all fields before it raises.
        problems = [_describe(details) for details in error.errors(include_url=False)]
        raise raises(*(f"{where}: {problem}. {remedy}" for problem in problems)) from error


def read_json_lines[T](path: Path, kind: type[T], *, remedy: str, raises: type[HammerError] = DataError) -> list[T]:
    """Return every line of a file as a typed object, without a last one that a kill cut off; see `read_json`."""
    lines = read_bytes(path, raises=raises).splitlines()
    if lines and not lines[-1].endswith(b"}"):
        del lines[-1]
    return [
        parse_json(line, kind, where=f"{path}:{number}", remedy=remedy, raises=raises)
        for number, line in enumerate(lines, 1)
    ]


def replace_non_finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for NaN and infinities, for which JSON has no number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


# Built once for each type, because parse_json may be called for every line of a file.
@functools.cache
def _build_adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _describe(details: "ErrorDetails") -> str:
    """One problem as `<field> must ..., got <value>`."""
    if details["type"] == "json_invalid":
        return f"content must be JSON, got: {details['ctx']['error']}"
    requirement = REQUIREMENTS.get(details["type"])
    if requirement is None:
        requirement = details["msg"].replace("Input should", "must", 1)
    else:
        requirement = requirement.format(**details.get("ctx", {}))
    found = "nothing" if details["type"] == "missing" else _shorten(repr(details["input"]))
    return f"{_name_field(details['loc'])} {requirement}, got {found}"


def _name_field(location: tuple[int | str, ...]) -> str:
    """('gpu', 'h100', 'aliases', 0) -> gpu.h100.aliases[0]."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".") or "content"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
