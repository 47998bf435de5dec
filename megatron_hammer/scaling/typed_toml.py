"""TOML tables as dataclasses: every wrong field of a file is reported at once, with its file, table and value.

The dataclass is the only description of a table: its types, and bounds as in `Annotated[float, Gt(0)]`.
"""

import functools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, cast

from annotated_types import Ge, Gt, Lt, MinLen

from megatron_hammer.errors import ConfigError

Text = Annotated[str, MinLen(1)]
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
AtLeastOne = Annotated[float, Ge(1), Lt(math.inf)]


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ConfigError for a file that cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: must be a readable file, got {error.strerror}. Pass a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a TOML file, got: {error}. Correct it there.") from error


def build_from_table[T](
    kind: type[T], table: Mapping[str, Any], where: str, problems: list[str], given: Mapping[str, Any] | None = None
) -> T | None:
    """A dataclass of this kind from a table's fields, or None with what is wrong added to `problems`.

    where: the file and the table, for messages. given: fields that the table must not hold, such as its own name.
    """
    from pydantic import ValidationError  # here: importing it takes longer than all of this room

    own = dict(given or {})
    known = [field.name for field in fields(kind) if field.name not in own]  # type: ignore[arg-type]
    unknown = [
        f"{where} {name}: must be a known field, got {name}={value!r}. Use {', '.join(known)}."
        for name, value in table.items()
        if name not in known
    ]
    values = {name: value for name, value in table.items() if name in known} | own
    try:
        # Through JSON, because only there strict typing accepts a list for a tuple and a whole number for a float.
        built: T | None = _build_adapter(cast(Any, kind)).validate_json(
            json.dumps(values, default=str), strict=True, extra="forbid"
        )
    except ValidationError as error:
        problems += [_describe(dict(fault), where) for fault in error.errors()]
        built = None
    problems += unknown
    return None if unknown else built


def build_list[T](kind: type[T], tables: Sequence[Mapping[str, Any]], where: str, problems: list[str]) -> tuple[T, ...]:
    """One dataclass for each table of a list, without those that have a problem."""
    built = [build_from_table(kind, table, f"{where} {number}", problems) for number, table in enumerate(tables, 1)]
    return tuple(one for one in built if one is not None)


@functools.cache
def _build_adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _describe(fault: dict[str, Any], where: str) -> str:
    """One of pydantic's errors as a sentence of fact and one of remedy."""
    field = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in fault["loc"]))
    if fault["type"] == "missing":
        return f"{where} {field}: must be given, got nothing. Add it to the table."
    must = re.sub(r"^\w+ should (be|have) ", r"must \1 ", fault["msg"]).replace("less than inf", "a finite number")
    return f"{where} {field}: {must}, got {field}={fault['input']!r}. Correct it there."
