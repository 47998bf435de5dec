"""Files become typed objects; all problems are named at once, by field and value."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, MinLen

from megatron_hammer.errors import ConfigError, DataError, HammerError
from megatron_hammer.files.typed import parse_json, read_json, read_toml, validate
from tests.helpers.messages import assert_problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    name: str
    size_bytes: Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    parts: tuple[Part, ...]
    ratio: Annotated[float, Gt(0)] = 0.5
    phase: Literal["begin", "end"] = "begin"
    texts: Annotated[tuple[str, ...], MinLen(1)] = ("a",)
    is_done: bool = False
    limit_s: float | None = None


WHOLE = Whole(parts=(Part(name="größe", size_bytes=3),), ratio=2, limit_s=7.5)
JSON = '{"parts": [{"name": "größe", "size_bytes": 3}], "ratio": 2, "limit_s": 7.5}'
TOML = 'ratio = 2\nlimit_s = 7.5\n[[parts]]\nname = "größe"\nsize_bytes = 3\n'


def problems_of(content: str, **options: bool) -> list[str]:
    with pytest.raises(DataError) as caught:
        parse_json(content, Whole, where="f.json:7", remedy="Repair it.", **options)
    return list(caught.value.problems)


def test_json_and_toml_become_the_same_object(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(JSON)
    (tmp_path / "f.toml").write_text(TOML)
    assert read_json(tmp_path / "f.json", Whole, remedy="") == WHOLE
    assert read_toml(tmp_path / "f.toml", Whole, remedy="") == WHOLE
    assert validate(dataclasses.asdict(WHOLE), Whole, where="", remedy="") == WHOLE


def test_all_problems_are_named_at_once() -> None:
    content = (
        '{"parts": [{"name": 1}, {"name": "b", "size_bytes": 0}, 5], "ratio": 0, "phase": "middle", "texts": [], '
        '"is_done": 1, "limit_s": "long"}'
    )
    assert problems_of(content) == [
        f"f.json:7: {problem}. Repair it."
        for problem in (
            "parts[0].name must be a text, got 1",
            "parts[0].size_bytes must be given, got nothing",
            "parts[1].size_bytes must be at least 1, got 0",
            "parts[2] must be a table, got 5",
            "ratio must be above 0, got 0",
            "phase must be 'begin' or 'end', got 'middle'",
            "texts must have a length of at least 1, got []",
            "is_done must be true or false, got 1",
            "limit_s must be a number, got 'long'",
        )
    ]


@pytest.mark.parametrize("value", ["true", '"3"', "3.5", "null"])
def test_a_count_must_be_a_whole_number(value: str) -> None:
    (problem,) = problems_of(f'{{"parts": [{{"name": "a", "size_bytes": {value}}}]}}')
    assert problem.startswith("f.json:7: parts[0].size_bytes must be a")


def test_unknown_fields_are_left_out_or_refused() -> None:
    content = JSON[:-1] + ', "added_later": 3}'
    assert parse_json(content, Whole, where="", remedy="") == WHOLE
    expected = "f.json:7: added_later must be a known field, got 3. Repair it."
    assert problems_of(content, allows_unknown=False) == [expected]


def test_a_long_value_is_cut_short() -> None:
    (problem,) = problems_of(f'{{"parts": "{"x" * 1000}"}}')
    assert_problem(problem, "f.json:7:", "parts must be a list", f"got '{'x' * 56}")


def test_a_value_of_a_plain_type_is_checked_too() -> None:
    with pytest.raises(DataError, match=r"^f: a\[1\] must be a whole number, got 'x'. Repair it\.$"):
        validate({"a": [1, "x"]}, dict[str, tuple[int, ...]], where="f", remedy="Repair it.")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("f.json", b"[1", "content must be JSON, got: EOF while parsing a list at line 1 column 2. Repair it."),
        ("f.json", b'"\xff"', "content must be JSON, got: invalid unicode code point"),
        ("f.json", b"[]", r"content must be a table, got \[\]. Repair it."),
        ("f.toml", b"a = ", "file must be TOML, got: Invalid value"),
        ("f.toml", b'a = "\xff"', "file must be TOML, got: 'utf-8' codec can't decode"),
        ("f.toml", b"ratio = inf\nparts = 1979-05-27", "parts must be a list, got '1979-05-27'. Repair it."),
        ("f.json", None, r"file cannot be read \(No such file or directory\). Check the path and its permissions."),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    read = read_toml if name.endswith(".toml") else read_json
    kinds: list[type[HammerError]] = [DataError, ConfigError]
    for kind in kinds:
        with pytest.raises(kind, match=rf"^{path}: {message}"):
            read(path, Whole, remedy="Repair it.", raises=kind)


def test_pydantic_is_loaded_at_the_first_call_only() -> None:
    code = "import sys, megatron_hammer.files.typed; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
