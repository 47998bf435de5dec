"""Run benchmarks on one model: lm-eval's loop over our scorer, without a network.

Read next: tasks.py for what is asked, scored_model.py for how a model answers, scores.py for what is reported.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.errors import PlatformError
from megatron_hammer.evaluation.benchmarks.scores import Score, collect_scores
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, find_kind, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer

# Draws for the standard errors of metrics that are no means; means need none.
BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """name: of the model, for tables. num_trained_tokens: None where it is not known. samples: of lm-eval."""

    name: str
    precision: str
    has_bos: bool
    num_trained_tokens: int | None
    scores: Sequence[Score]
    samples: Sequence[dict[str, Any]]


def forbid_network() -> None:
    """Have the libraries of Hugging Face read local files only; they look at these variables when they are imported.

    Raises PlatformError without lm-eval.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # lm-eval has a bar for every task
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise PlatformError(
            f"lm-eval: must be installed for benchmarks, got: {error}. pip install 'megatron_hammer[evaluation]'."
        ) from error
    datasets.disable_progress_bars()
    # It reports every task that it builds.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def evaluate_model(path: Path, suite: EvaluationSuite, options: ScorerOptions) -> Evaluated | None:
    """Evaluate one model on rank 0; None on the others, which hold their part of it.

    Raises HammerError for what the user can fix: for tasks and data before the model is opened.
    """
    from megatron_hammer.evaluation.benchmarks.tasks import load_tasks

    loads = [
        load_tasks(
            suite.tasks,
            tasks_dir=None if suite.tasks_dir is None else Path(suite.tasks_dir),
            data_dir=None if suite.data_dir is None else Path(suite.data_dir),
            num_fewshot=num_fewshot,
            runs_code=suite.runs_generated_code,
        )
        for num_fewshot in suite.num_fewshot
    ]
    return use_scorer(path, options, lambda scorer: evaluate_scorer(scorer, path, suite, loads))


def evaluate_scorer(scorer: Scorer, path: Path, suite: EvaluationSuite, loads: Sequence[dict[str, Any]]) -> Evaluated:
    """Run loaded tasks. path: of the model, in whose folder its chat template is. loads: one for each num_fewshot."""
    from lm_eval.evaluator import evaluate

    from megatron_hammer.evaluation.benchmarks.scored_model import ScoredModel, load_chat_tokenizer

    tokenizer = load_chat_tokenizer(Path(suite.tokenizer_model or path)) if suite.applies_chat_template else None
    has_bos = begins_with_bos(scorer, path) if suite.has_bos is None else suite.has_bos
    model = ScoredModel(scorer, has_bos=has_bos, tokenizer=tokenizer)
    scores: list[Score] = []
    samples: list[dict[str, Any]] = []
    for num_fewshot, loaded in zip(suite.num_fewshot, loads, strict=True):
        results = evaluate(
            lm=model,
            task_dict=loaded,
            limit=suite.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            apply_chat_template=suite.applies_chat_template,
            fewshot_as_multiturn=suite.has_multiturn_fewshot,
            confirm_run_unsafe_code=suite.runs_generated_code,
        )
        scores += collect_scores(results, loaded, num_fewshot)
        samples += [
            {"model": scorer.name, "task": task, "num_fewshot": num_fewshot, **sample}
            for task, of_task in results["samples"].items()
            for sample in of_task
        ]
    return Evaluated(
        name=scorer.name,
        precision=scorer.precision,
        has_bos=has_bos,
        num_trained_tokens=scorer.num_trained_tokens,
        scores=scores,
        samples=samples,
    )


def begins_with_bos(scorer: Scorer, path: Path) -> bool:
    """Whether the tokenizer of a Hugging Face folder puts BOS before a text; False for other models."""
    bos_id = scorer.encoder.bos_id
    if bos_id is None or find_kind(path) != "hugging_face":
        return False
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return bool(tokenizer("A")["input_ids"][0] == bos_id)
