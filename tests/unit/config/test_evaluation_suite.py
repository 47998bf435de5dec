from pathlib import Path

import pytest

from megatron_hammer.config.evaluation_suite import EvaluationSuite, find_unused_fields, read_suite
from megatron_hammer.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    (folder / "suite.toml").write_text(text)
    return folder / "suite.toml"


def test_a_suite_is_read(tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, 'tasks = ["piqa"]\nnum_fewshot = [0, 5]\nlimit = 10\nbos = "eod"\n'))
    assert suite == EvaluationSuite(tasks=("piqa",), num_fewshot=(0, 5), limit=10, bos="eod")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"suite.toml: tasks or domains must name at least one"),
        ("tasks = []", r"tasks or domains must name at least one"),
        ('tasks = ["piqa"]\nnum_fewshot = []', r"num_fewshot must name at least one"),
        ('tasks = ["piqa"]\nlimit = 0', r"limit must be at least 1, got 0"),
        ('tasks = ["piqa"]\nnum_fewshot = [-1]', r"num_fewshot.* must be at least 0"),
        ('tasks = ["piqa"]\nshots = 5', r"shots must be a known field"),
        ('tasks = ["piqa"]\nplatform = "tpu"', r"platform must be 'auto', 'cpu' or 'cuda'"),
        ('domains = ["zh.jsonl"]', r"domains must be"),
        ('domains = { zh = "zh.jsonl" }\nmax_documents = 0', r"max_documents must be at least 1, got 0"),
        ("tasks = [", r"file must be TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_suite(write(tmp_path, text))


def test_fields_that_act_on_nothing_are_named() -> None:
    assert find_unused_fields(EvaluationSuite(tasks=("piqa",), limit=3, domains={"zh": "x"}, max_documents=2)) == []
    problems = find_unused_fields(
        EvaluationSuite(domains={"zh": "x"}, limit=3, num_fewshot=(0, 5), has_multiturn_fewshot=False)
    )
    assert [problem.split(":")[0] for problem in problems] == ["num_fewshot", "limit", "has_multiturn_fewshot"]
    assert "got [0, 5]. Drop it, or add tasks" in problems[0]
    (problem,) = find_unused_fields(EvaluationSuite(tasks=("piqa",), max_documents=2))
    assert problem.startswith("max_documents: acts on domains, of which there are none, got 2")
