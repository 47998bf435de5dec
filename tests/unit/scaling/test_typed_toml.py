"""Tables become dataclasses, and what is wrong with them becomes sentences."""

from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.typed_toml import PositiveFloat, PositiveInt, Text, build_from_table, build_list, read_toml


@dataclass(frozen=True, kw_only=True)
class Bridge:
    name: str
    length_m: PositiveFloat
    lanes: PositiveInt = 2
    spans: tuple[Text, ...] = ()
    kind: Literal["arch", "beam"] = "beam"


def build(**table: object) -> tuple[Bridge | None, list[str]]:
    problems: list[str] = []
    return build_from_table(Bridge, table, "bridges.toml: [b]", problems, given={"name": "b"}), problems


def test_whole_numbers_are_numbers_and_lists_are_tuples() -> None:
    bridge, problems = build(length_m=7, spans=["a", "b"], kind="arch")
    assert bridge == Bridge(name="b", length_m=7.0, spans=("a", "b"), kind="arch")
    assert problems == []


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({}, "length_m: must be given, got nothing. Add it to the table."),
        ({"length_m": float("inf")}, "length_m: must be a finite number, got length_m=inf."),
        ({"length_m": float("nan")}, "length_m: must be a finite number, got length_m=nan. Correct it there."),
        ({"length_m": "7"}, "length_m: must be a valid number, got length_m='7'. Correct it there."),
        ({"length_m": 7, "lanes": True}, "lanes: must be a valid integer, got lanes=True. Correct it there."),
        ({"length_m": 7, "spans": ["a", ""]}, "spans[1]: must have at least 1 character, got spans[1]=''."),
        ({"length_m": 7, "kind": "rope"}, "kind: must be 'arch' or 'beam', got kind='rope'."),
        ({"length_m": 7, "hue": 3}, "hue: must be a known field, got hue=3. Use length_m, lanes, spans, kind."),
        ({"length_m": 7, "name": "c"}, "name: must be a known field, got name='c'. Use length_m,"),
    ],
)
def test_a_wrong_field_is_named(table: dict[str, object], problem: str) -> None:
    bridge, problems = build(**table)
    assert bridge is None
    (found,) = problems
    assert found.startswith(f"bridges.toml: [b] {problem}")


def test_all_problems_of_a_list_are_found() -> None:
    problems: list[str] = []
    tables = [{"name": "a", "length_m": 1}, {"name": "b"}, {"name": "c", "length_m": -1, "lanes": 0}]
    assert [bridge.name for bridge in build_list(Bridge, tables, "f: bridge", problems)] == ["a"]
    assert [problem.split(":")[1] for problem in problems] == [
        " bridge 2 length_m",
        " bridge 3 length_m",
        " bridge 3 lanes",
    ]


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: must be a readable file, got No such file or directory"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "odd.toml").write_text("[a\n")
    with pytest.raises(ConfigError, match=r"odd\.toml: must be a TOML file, got: "):
        read_toml(tmp_path / "odd.toml")
