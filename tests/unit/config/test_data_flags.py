import json
from pathlib import Path

import pytest

from megatron_hammer.data.sources import DataSource, parse_blend, parse_split
from tests.helpers.parsed_flags import parse


@pytest.mark.parametrize("words", ["a", "a b", "a b c", "3 a 1 b", "0.5 a", "1e1 a 2 b"])
def test_blends_are_read_as_megatron_reads_them(words: str) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    sources, problems = parse_blend("data-path", words.split())
    assert problems == []
    prefixes, weights = get_blend_from_list(words.split())
    assert [source.prefix for source in sources] == prefixes
    assert [source.weight for source in sources] == (weights or [None] * len(prefixes))


@pytest.mark.parametrize("words", ["0.7 a b", "0.7 a b 0.3", "0.7 0.3", "a 0.3", "0.5 a b c"])
def test_half_weighted_blends(words: str) -> None:
    sources, (problem,) = parse_blend("train-data-path", words.split())
    assert sources == ()
    assert f"train-data-path: must be prefixes alone, or a weight before every prefix, got {words}." in problem


@pytest.mark.parametrize("words", ["a b a", "0.5 a 0.2 b 0.3 a"])
def test_a_data_set_that_comes_twice_is_refused(words: str) -> None:
    _, (problem,) = parse_blend("data-path", words.split())
    assert "data-path: a data set must be named once, got a 2 times." in problem


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_text_that_is_not_a_weight_is_refused(weight: str) -> None:
    _, (problem,) = parse_blend("data-path", [weight, "a", "1", "b"])
    assert "weights must be positive and finite" in problem


@pytest.mark.parametrize("text", ["98,2,0", "969, 30, 1", "1", "90/10", "0.9,0.1"])
def test_splits_are_read_as_megatron_reads_them(text: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    shares, problems = parse_split(text)
    assert problems == []
    assert shares == pytest.approx(parse_and_normalize_split(text))


@pytest.mark.parametrize("text", [None, "", "98,-2,0", "1e2,1", "a,b", "1,2,3,4", "0,0,0", "0,1,0", "98;2", "1,,2"])
def test_impossible_splits_are_refused(text: str | None) -> None:
    """Megatron reads 98,-2,0 as 98,2,0 and 1e2,1 as 1,2,1."""
    shares, (problem,) = parse_split(text)
    assert shares is None
    assert (
        f"split: must be three shares for training, validation and test, the first above 0, got split={text}."
        in problem
    )


def read(*flags: str):
    data = parse("--preset", "hammer-tiny", *flags).settings.data
    return data.sources, list(data.problems)


def test_plan_of_a_shared_blend() -> None:
    plan, problems = read("--data-path", "3", "a", "1", "b", "--split", "80,20,0")
    assert problems == []
    assert plan.sources_of("train") == plan.sources_of("valid") == (
        DataSource(prefix="a", weight=3), DataSource(prefix="b", weight=1)
    )  # fmt: skip
    assert plan.sources_of("test") == ()
    assert plan.bounds_of("valid") == pytest.approx((0.8, 1.0))


def test_plan_of_separate_sets() -> None:
    plan, problems = read("--train-data-path", "a", "--valid-data-path", "b", "c")
    assert problems == []
    assert [source.prefix for source in plan.sources_of("valid")] == ["b", "c"]
    assert plan.bounds_of("valid") == (0.0, 1.0)
    assert plan.sources_of("test") == ()


def test_plans_from_files(tmp_path: Path) -> None:
    (tmp_path / "blend.txt").write_text("3 a\n1 b\n")
    plan, problems = read("--data-args-path", str(tmp_path / "blend.txt"))
    assert (problems, [source.weight for source in plan.shared]) == ([], [3, 1])
    (tmp_path / "splits.json").write_text(json.dumps({"train": "1 a 2 b", "valid": ["c"], "test": None}))
    plan, problems = read("--per-split-data-args-path", str(tmp_path / "splits.json"))
    assert problems == []
    assert [source.prefix for source in plan.sources_of("train")] == ["a", "b"]
    assert plan.sources_of("test") == ()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--train-data-path a --split 98,2,0", "cannot be combined with a data set for each split, got split=98,2,0"),
        ("--valid-data-path a", "train-data-path: training needs a data set, got none"),
        ("--data-path a --train-data-path b", "data comes from one place, got --data-path, --train-data-path"),
        ("--data-args-path nowhere.txt", "data-args-path: must be a text file of prefixes, got nowhere.txt"),
        ("--per-split-data-args-path nowhere.json", "must be a JSON object with the keys train, valid and test"),
    ],
)
def test_contradicting_data_flags_are_refused(flags: str, match: str) -> None:
    _, problems = read(*flags.split())
    assert len(problems) == 1
    assert match in problems[0]


def test_a_split_file_without_a_key(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('{"train": "a"}')
    _, (problem,) = read("--per-split-data-args-path", str(tmp_path / "splits.json"))
    assert "KeyError: 'valid'" in problem


@pytest.mark.parametrize(
    "content", ['{"train": [1, 2], "valid": null, "test": null}', '{"train": "a", "valid": 5, "test": null}']
)
def test_a_split_file_of_numbers(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits.json").write_text(content)
    _, (problem,) = read("--per-split-data-args-path", str(tmp_path / "splits.json"))
    assert "is neither a list of strings nor null" in problem
