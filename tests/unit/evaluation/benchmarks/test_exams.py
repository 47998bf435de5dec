import pytest

from megatron_hammer.evaluation.benchmarks.exams import build_task, extract_option, list_exam_tasks, read_exam


def test_every_subject_of_the_published_exams_is_there() -> None:
    sizes = {name: len(config["task"]) for name, config in list_exam_tasks() if "group" in config}
    assert sizes == {"ceval-ppl": 52, "ceval-gen": 52, "cmmlu-ppl": 67, "cmmlu-gen": 67}
    by_category: dict[str, int] = {}
    for subject in read_exam("ceval").subjects.values():
        for category in subject.categories:
            by_category[category] = by_category.get(category, 0) + 1
    # Of the paper's table of subjects.
    assert by_category == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11, "Hard": 8}
    china = [name for name, subject in read_exam("cmmlu").subjects.items() if "China specific" in subject.categories]
    assert len(china) == 15


def test_lm_eval_has_the_same_subjects() -> None:
    from pathlib import Path

    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for exam, folder, prefix in (("ceval", "ceval", "ceval-valid_"), ("cmmlu", "cmmlu", "cmmlu_")):
        theirs = {path.stem.removeprefix(prefix) for path in (root / folder).glob(f"{prefix}*.yaml")}
        assert set(read_exam(exam).subjects) == theirs


def test_prompts_are_the_published_ones() -> None:
    config = build_task(read_exam("ceval"), "t", "law", "ppl")
    assert config["description"] == "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
    assert config["target_delimiter"] == ""
    assert config["validation_split"] == "val"
    assert build_task(read_exam("cmmlu"), "t", "agronomy", "gen")["test_split"] == "test"


@pytest.mark.parametrize(
    "text, option",
    [
        ("B", "B"),
        ("B. 乙", "B"),
        (" C、因为", "C"),
        ("答案是D。", "D"),
        ("答案：Ｃ", "C"),
        ("正确答案应该是【A】", "A"),
        ("A选项不对，B也不对，所以答案为C", "C"),
        ("A错误，故选D", "D"),
        ("不选A，应选B", "B"),
        ("不能选择A，应选B", "B"),
        ("【解析】A项错误。【答案】B", "B"),
        ("A is wrong. **ANSWER:** (B)", "B"),
        ("A错误，答案应为「B」", "B"),
        ("A错误，正确选项就是 B", "B"),
        (r"A错误，答案是选项$\boxed{B}$", "B"),
        ("答案是ACD", ""),
        ("Because A is wrong, the answer is B.", "B"),
        ("The Answer: (C)", "C"),
        ("**D**", "D"),
        ("ABC", ""),
        ("E", ""),
        ("", ""),
        ("我不知道", ""),
    ],
)
def test_the_option_is_extracted(text: str, option: str) -> None:
    assert extract_option(text) == option
