"""Scores with what makes them comparable: standard error, chance level and number of questions; and their averages."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

SKIPPED_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """value, standard_error and chance are shares from 0 to 1 for accuracies; other metrics have their own unit.

    standard_error: of the mean over questions, for an average that of its tasks, taken as independent; None if the
    metric has none. chance: the mean score of guessing; None where guessing has no score of its own. num_tasks: above
    1 for an average, the mean of its tasks with equal weights, as C-Eval and CMMLU report it; question_mean: the mean
    over all their questions. num_unanswered: questions without an extracted answer, which count as wrong. is_part: an
    average of its own group covers it.
    """

    task: str
    metric: str
    num_fewshot: int
    value: float
    standard_error: float | None
    chance: float | None
    num_questions: int
    num_tasks: int = 1
    question_mean: float | None = None
    num_unanswered: int | None = None
    is_part: bool = False


def collect_scores(results: Mapping[str, Any], loaded: Mapping[str, Any], num_fewshot: int) -> list[Score]:
    """The scores of lm-eval's results, with averages behind the tasks that they cover.

    loaded: what load_tasks returned. num_fewshot: as asked for; a task may have fixed another number.
    """
    tasks = loaded["tasks"]
    scores = {
        name: score_task(name, task, results["results"][name], results["samples"][name], num_fewshot)
        for name, task in tasks.items()
    }
    groups = loaded.get("group_map", {})
    parts = {name for group in groups for name in _list_tasks(group, loaded)}
    rows = [replace(score, is_part=name in parts) for name, of_task in scores.items() for score in of_task]
    for group, members in groups.items():
        covered = [name for member in members for name in _list_tasks(member, loaded)]
        categories: dict[str, list[str]] = {}
        for name in covered:
            for category in (tasks[name].config.metadata or {}).get("categories", ()):
                categories.setdefault(category, []).append(name)
        for title, names in (*((f"{group}: {key}", value) for key, value in categories.items()), (group, covered)):
            averages = average(title, [score for name in names for score in scores[name]])
            rows += [replace(score, is_part=title != group) for score in averages]
    return rows


def _list_tasks(name: str, loaded: Mapping[str, Any]) -> list[str]:
    members = loaded["group_map"].get(name)
    return [name] if members is None else [task for member in members for task in _list_tasks(member, loaded)]


def score_task(
    name: str, task: Any, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], num_fewshot: int
) -> list[Score]:
    """The scores of one task, one for each metric. samples: lm-eval's record of every question."""
    own_fewshot = task.get_config("num_fewshot")
    questions = {sample["doc_id"]: sample for sample in samples}
    is_extracted = (task.config.metadata or {}).get("num_choices") and task.OUTPUT_TYPE == "generate_until"
    unanswered = sum(sample["filtered_resps"] == [""] for sample in questions.values()) if is_extracted else None
    scores = []
    for key, value in result.items():
        metric, _, filter_name = key.partition(",")
        if not isinstance(value, int | float) or metric in SKIPPED_METRICS or metric.endswith("_stderr"):
            continue
        error = result.get(f"{metric}_stderr,{filter_name}")
        scores.append(
            Score(
                task=name,
                metric=metric,
                num_fewshot=num_fewshot if own_fewshot is None else own_fewshot,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                chance=find_chance(task, metric, [sample["doc"] for sample in questions.values()]),
                num_questions=len(questions),
                num_unanswered=unanswered,
            )
        )
    return scores


def find_chance(task: Any, metric: str, docs: Sequence[Any]) -> float | None:
    """The mean over questions of one in the number of their options; 0 for programs that must pass tests."""
    if metric.startswith("pass@"):
        return 0.0
    num_choices = (task.config.metadata or {}).get("num_choices")
    if num_choices:
        return 1 / float(num_choices)
    if task.OUTPUT_TYPE != "multiple_choice" or metric not in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"):
        return None
    return statistics.fmean(1 / len(task.doc_to_choice(doc)) for doc in docs)


def average(title: str, scores: Iterable[Score]) -> list[Score]:
    """The mean of several tasks, for each metric that they share."""
    by_metric: dict[str, list[Score]] = {}
    for score in scores:
        by_metric.setdefault(score.metric, []).append(score)
    rows = []
    for metric, members in by_metric.items():
        errors = [member.standard_error for member in members]
        chances = [member.chance for member in members]
        num_questions = sum(member.num_questions for member in members)
        known_errors = [error for error in errors if error is not None]
        known_chances = [chance for chance in chances if chance is not None]
        unanswered = [member.num_unanswered for member in members if member.num_unanswered is not None]
        rows.append(
            Score(
                task=title,
                metric=metric,
                num_fewshot=members[0].num_fewshot,
                value=statistics.fmean(member.value for member in members),
                # Of a mean of independent values: the root of the sum of squares, over their number.
                standard_error=math.sqrt(sum(error**2 for error in known_errors)) / len(members)
                if len(known_errors) == len(members)
                else None,
                chance=statistics.fmean(known_chances) if len(known_chances) == len(members) else None,
                num_questions=num_questions,
                num_tasks=len(members),
                question_mean=sum(member.value * member.num_questions for member in members) / num_questions,
                num_unanswered=sum(unanswered) if unanswered else None,
            )
        )
    return rows


COLUMNS = ("model", "tokens", "task", "metric", "shots", "score", "± s.e.", "chance", "questions", "unanswered")


def list_rows(model: str, tokens: str, scores: Iterable[Score]) -> list[tuple[str, ...]]:
    """The rows of the table under COLUMNS; shares in per cent. tokens: how many the model was trained on."""
    return [
        (
            model,
            tokens,
            score.task if score.num_tasks == 1 else f"{score.task} (mean of {score.num_tasks} tasks)",
            score.metric,
            str(score.num_fewshot),
            *(format_value(score.metric, value) for value in (score.value, score.standard_error, score.chance)),
            f"{score.num_questions:,}",
            "-" if score.num_unanswered is None else str(score.num_unanswered),
        )
        for score in scores
    ]


def format_value(metric: str, value: float | None) -> str:
    """A score, an error or a chance of a metric; a hyphen where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if is_share(metric) else f"{value:.4f}"


def is_share(metric: str) -> bool:
    """Whether its values are from 0 to 1, and shown in per cent."""
    return metric.startswith(("acc", "exact_match", "pass@")) or metric in ("f1", "mcc")
