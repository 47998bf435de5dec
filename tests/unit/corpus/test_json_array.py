"""An array is cut where a JSON parser would, whatever the size of the buffer."""

import io
import itertools
import json

import pytest

from megatron_hammer.corpus.json_array import BrokenArrayError, ElementRun, cut_elements, split_elements

ELEMENTS = [
    {"text": 'a "quoted" \\ text, with [brackets] and {braces}', "n": [1, [2, {"x": ","}]]},
    {"text": "\\", "more": '\\\\"'},
    {},
    [],
    3.5,
    "just, text",
    None,
    {"text": "汉字" * 50},
]


def cut(content: bytes, run_bytes: int) -> list[ElementRun]:
    assert content[:1] == b"["
    return list(cut_elements(io.BytesIO(content[1:]), run_bytes, is_first=True))


@pytest.mark.parametrize("run_bytes", [1, 2, 3, 7, 64, 100_000])
@pytest.mark.parametrize("style", [{"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_elements_are_those_of_a_parser(style: dict, run_bytes: int) -> None:
    content = json.dumps(ELEMENTS, **style).encode()
    runs = cut(content, run_bytes)
    parts = [part for run in runs for part in split_elements(run.payload)]
    assert [json.loads(part) for part in parts] == ELEMENTS
    assert sum(run.num_elements for run in runs) == len(ELEMENTS)
    assert all(len(run.payload) >= run_bytes for run in runs[:-1])


def test_each_run_of_elements_gives_the_offset_of_the_next() -> None:
    content = json.dumps(ELEMENTS).encode()
    runs = cut(content, 20)
    assert len(runs) > 3
    for before, run in itertools.pairwise(runs):
        assert before.end is not None
        again = next(cut_elements(io.BytesIO(content[1 + before.end :]), 20, is_first=False))
        assert (again.payload, again.num_elements) == (run.payload, run.num_elements)
    assert runs[-1].end is None


@pytest.mark.parametrize("content", [b"[]", b"[ \n ]", b"[]\n\n"])
def test_an_empty_array_has_no_elements(content: bytes) -> None:
    assert cut(content, 4) == []


def test_a_missing_element_is_an_empty_one() -> None:
    (run,) = cut(b"[1,,2,]", 100)
    assert split_elements(run.payload) == [b"1", b"", b"2", b""]
    assert run.num_elements == 4


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[", "the array has no end"),
        (b'[{"a": 1}', "the array has no end"),
        (b'["a]', "the array has no end"),
        (b"[1] 2", "something follows the array"),
        (b"[1]]", "something follows the array"),
    ],
)
@pytest.mark.parametrize("run_bytes", [1, 100])
def test_broken_arrays_are_refused(content: bytes, message: str, run_bytes: int) -> None:
    with pytest.raises(BrokenArrayError, match=message):
        cut(content, run_bytes)
