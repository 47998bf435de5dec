import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hammer.evaluation.benchmarks.scores import COLUMNS, Score, average, collect_scores, list_rows


def build_task(num_choices: list[int], **metadata: Any) -> Any:
    config = SimpleNamespace(metadata=metadata)
    return SimpleNamespace(
        config=config,
        OUTPUT_TYPE="multiple_choice",
        get_config=lambda name: None,
        doc_to_choice=lambda doc: list(range(num_choices[doc])),
    )


def build_score(task: str, value: float, num_questions: int, *, error: float | None = 0.1) -> Score:
    return Score(
        task=task, metric="acc", num_fewshot=5, value=value, standard_error=error, chance=0.25,
        num_questions=num_questions,
    )  # fmt: skip


def test_scores_have_error_chance_and_number_of_questions() -> None:
    loaded = {
        "tasks": {"a": build_task([4, 5], categories=["STEM"]), "b": build_task([2, 2], categories=["STEM", "Hard"])},
        "group_map": {"exam": ["a", "b"]},
    }
    samples = [{"doc_id": number, "doc": number, "filtered_resps": [(-1.0, False)]} for number in range(2)]
    result = {"acc,none": 0.5, "acc_stderr,none": 0.2, "alias": "a", "sample_len": 2}
    results = {
        "results": {"a": result, "b": {**result, "acc,none": 1.0, "acc_stderr,none": "N/A"}},
        "samples": {"a": samples, "b": samples[:1]},
    }
    rows = {score.task: score for score in collect_scores(results, loaded, 5)}
    assert list(rows) == ["a", "b", "exam: STEM", "exam: Hard", "exam"]
    assert rows["a"] == Score(
        task="a", metric="acc", num_fewshot=5, value=0.5, standard_error=0.2, chance=(1 / 4 + 1 / 5) / 2,
        num_questions=2, is_part=True,
    )  # fmt: skip
    assert [name for name, score in rows.items() if not score.is_part] == ["exam"]
    assert rows["b"].standard_error is None
    assert rows["exam: Hard"].value == 1.0
    assert (rows["exam"].value, rows["exam"].num_tasks, rows["exam"].num_questions) == (0.75, 2, 3)
    assert rows["exam"].standard_error is None
    assert rows["exam"].question_mean == pytest.approx((0.5 * 2 + 1.0 * 1) / 3)


def test_an_average_has_equal_weights_and_the_error_of_independent_tasks() -> None:
    (row,) = average("both", [build_score("a", 0.2, 10, error=0.03), build_score("b", 0.6, 30, error=0.04)])
    assert row.value == pytest.approx(0.4)
    assert row.standard_error == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert row.question_mean == pytest.approx(0.5)
    assert row.chance == 0.25


def test_the_table_is_in_per_cent() -> None:
    (row,) = list_rows("m", "1.3M", [build_score("a", 0.23481, 1346, error=0.0115)])
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "model": "m", "tokens": "1.3M", "task": "a", "metric": "acc", "shots": "5", "score": "23.48", "± s.e.": "1.15",
        "chance": "25.00", "questions": "1,346", "unanswered": "-",
    }  # fmt: skip
    (lost,) = list_rows("m", "-", [build_score("a", math.nan, 2, error=None)])
    assert lost[5:7] == ("-", "-")
