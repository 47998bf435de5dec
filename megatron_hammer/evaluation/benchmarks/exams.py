"""C-Eval and CMMLU as lm-eval tasks, in the two styles in which their scores are published.

ppl: the option whose letter is likeliest after the prompt is the answer. gen: the model continues the prompt, and the
answer is extracted from what it says. Prompts, names and categories are in exams/*.toml, with their sources.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.files.typed import read_toml

OPTIONS = ["A", "B", "C", "D"]
EXAMS = ("ceval", "cmmlu")
STYLES = ("ppl", "gen")
GROUPS = tuple(f"{exam}-{style}" for exam in EXAMS for style in STYLES)
# A base model writes the next question after an empty line; a chat model's answer ends by its end-of-turn token.
GENERATION = {"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False}
_FULL_WIDTH = str.maketrans("ＡＢＣＤ", "ABCD")
# Not part of a word: "Because A is" has no option in "Because".
_LETTER = r"(?<![A-Za-z])([ABCD])(?![A-Za-z])"
# What stands before the letter: brackets, quotes, marks of Markdown and TeX, also closed ones as in 【答案】B.
_BEFORE = r"(?:\\\w+\{|[\s:：\"'“‘「『(（\[\]【】<*$])*"
_STATEMENT = re.compile(
    rf"(?:答案|正确的?选项|(?i:answer))[】*]*(?:应该|应当|应|选项|就)?(?:是|为|选|\s+is)?(?:选项)?{_BEFORE}{_LETTER}"
    rf"|(?<![不非])(?<!不[能可应会])(?:故选|应选|选择|选){_BEFORE}{_LETTER}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """name: Chinese, for the prompt. A subject may be in several categories."""

    name: str
    categories: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """description: with {name} of the subject. question: a Jinja template. answer: the field with the right letter."""

    dataset: str
    eval_split: str
    fewshot_split: str
    description: str
    question: str
    answer: str
    subjects: dict[str, Subject]


def read_exam(name: str) -> Exam:
    """Of `EXAMS`."""
    path = Path(__file__).with_name("exams") / f"{name}.toml"
    return read_toml(path, Exam, remedy="Correct it", allows_unknown=False)


def list_exam_tasks() -> Iterator[tuple[str, dict[str, Any]]]:
    """lm-eval's configuration of every group (ceval-ppl) and every subject in it (ceval-ppl_law), by name."""
    for name in EXAMS:
        exam = read_exam(name)
        for style in STYLES:
            group = f"{name}-{style}"
            yield group, {"group": group, "task": [f"{group}_{subject}" for subject in exam.subjects]}
            for subject in exam.subjects:
                yield f"{group}_{subject}", build_task(exam, f"{group}_{subject}", subject, style)


def build_task(exam: Exam, task: str, subject: str, style: str) -> dict[str, Any]:
    """lm-eval's configuration of one subject."""
    index = f"{OPTIONS}.index({exam.answer}.strip().upper())"  # which raises for what is no option
    config: dict[str, Any] = {
        "task": task,
        "task_alias": subject,
        "dataset_path": exam.dataset,
        "dataset_name": subject,
        # lm-eval prefers test to validation.
        ("test_split" if exam.eval_split == "test" else "validation_split"): exam.eval_split,
        "fewshot_split": exam.fewshot_split,
        "fewshot_config": {"sampler": "first_n"},
        "description": exam.description.format(name=exam.subjects[subject].name),
        "doc_to_text": exam.question,
        "target_delimiter": "",  # "答案：A", as published; lm-eval's own puts a space before the letter
        "metadata": {"version": 1.0, "categories": list(exam.subjects[subject].categories), "num_choices": 4},
    }
    if style == "ppl":
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        own: dict[str, Any] = {
            "output_type": "multiple_choice",
            "doc_to_choice": OPTIONS,
            "doc_to_target": f"{{{{{index}}}}}",
        }
    else:
        metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
        own = {
            "output_type": "generate_until",
            "doc_to_target": f"{{{{{OPTIONS}[{index}]}}}}",
            "generation_kwargs": dict(GENERATION),
            "filter_list": [{"name": "option", "filter": [{"function": "custom", "filter_fn": extract_options}]}],
        }
    return {**config, **own, "metric_list": [metric]}


def extract_options(responses: Sequence[Sequence[str]], docs: Sequence[Any]) -> list[str]:
    """lm-eval's filter: the option of the first response to each question."""
    return [extract_option(of_question[0]) for of_question in responses]


def extract_option(text: str) -> str:
    """The letter that a text gives as its answer; "" if it gives none, which counts as wrong.

    That of the first statement (答案是B, 故选B, the answer is B), else the first letter that stands alone.
    """
    text = text.translate(_FULL_WIDTH)
    found = _STATEMENT.search(text) or re.search(_LETTER, text)
    return "" if found is None else next(letter for letter in found.groups() if letter)
