"""Run a suite on one model: lm-eval's loop over our scorer, then texts. offline.py comes before everything here.

Read next: tasks.py for what is asked, scored_model.py for how a model answers, scores.py for what is reported.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.errors import ConfigError
from megatron_hammer.evaluation.benchmarks.scores import Score, collect_scores
from megatron_hammer.evaluation.perplexity.domains import Domain, DomainOptions, is_pair, read_domain
from megatron_hammer.evaluation.perplexity.formula import estimate_domain
from megatron_hammer.evaluation.perplexity.measure import MeasureOptions, ModelScores, ReferenceTokenizer, measure_model
from megatron_hammer.evaluation.scorers.megatron_ranks import is_first_process
from megatron_hammer.evaluation.scorers.named_models import NamedModel
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer
from megatron_hammer.tokenizer.encoding.encoder import load_encoder

# Draws for the standard errors of metrics that are no means; means need none.
BOOTSTRAP_DRAWS = 1000
FEWSHOT_SEED = 1234  # lm-eval's
NORMAL_INTERVAL = 2 * 1.96  # standard errors in an interval of 95 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """name: of the model, for tables. bos: what stood before texts: bos, eod or none. samples: of lm-eval.

    num_trained_tokens: None where it is not known. texts: what was measured on the texts of the suite. reference: the
    tokenizer by whose tokens their perplexity counts. run: of NamedModel.
    """

    name: str
    precision: str
    bos: str
    num_trained_tokens: int | None
    scores: Sequence[Score]
    samples: Sequence[dict[str, Any]]
    texts: ModelScores | None = None
    reference: str | None = None
    run: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What a suite asks, read once for all models. loads: lm-eval's tasks by number of examples.

    references: empty until the first model gives its tokenizer, by whose tokens the perplexity of all models counts.
    """

    suite: EvaluationSuite
    loads: Mapping[int, dict[str, Any]]
    domains: Sequence[Domain]
    references: list[ReferenceTokenizer] = field(default_factory=list)


def read_questions(suite: EvaluationSuite) -> Questions:
    """Raises HammerError for everything that is wrong with the tasks, their data or the texts."""
    return Questions(
        suite=suite, loads=load_all_tasks(suite), domains=read_domains(suite) if is_first_process() else []
    )


def evaluate_model(model: NamedModel, questions: Questions, options: ScorerOptions) -> Evaluated | None:
    """Evaluate one model on rank 0; None on the others, which hold their part of it.

    Raises HammerError for what the user can fix.
    """

    def work(scorer: Scorer) -> Evaluated:
        scorer.name = model.name or scorer.name
        evaluated = evaluate_scorer(scorer, model.path, questions.suite, questions.loads)
        questions.references[:] = questions.references or [ReferenceTokenizer(scorer.encoder)]
        texts = measure_texts(scorer, questions) if questions.domains else None
        of_texts = [] if texts is None else score_texts(texts)
        reference = str(questions.references[0].path)
        scores = [*evaluated.scores, *of_texts]
        return replace(evaluated, scores=scores, texts=texts, reference=reference, run=model.run)

    return use_scorer(model.path, replace(options, iteration=model.iteration), work)


def load_all_tasks(suite: EvaluationSuite) -> dict[int, dict[str, Any]]:
    """The tasks with their data, by number of examples; raises HammerError for all that is wrong."""
    from megatron_hammer.evaluation.benchmarks.tasks import load_tasks

    if not suite.tasks:
        return {}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it reports every task that it builds
    return {
        num_fewshot: load_tasks(
            suite.tasks,
            tasks_dir=None if suite.tasks_dir is None else Path(suite.tasks_dir),
            data_dir=None if suite.data_dir is None else Path(suite.data_dir),
            num_fewshot=num_fewshot,
            runs_code=suite.runs_generated_code,
            max_new_tokens=suite.max_new_tokens,
            limit=suite.limit,
        )
        for num_fewshot in suite.num_fewshot
    }


def evaluate_scorer(
    scorer: Scorer, path: Path, suite: EvaluationSuite, loads: Mapping[int, dict[str, Any]]
) -> Evaluated:
    """Run loaded tasks. path: of the model, in whose folder its chat template is. loads: by number of examples."""
    from lm_eval.evaluator import evaluate

    from megatron_hammer.evaluation.benchmarks.scored_model import ScoredModel, load_chat_tokenizer

    tokenizer = load_chat_tokenizer(Path(suite.tokenizer_model or path)) if suite.applies_chat_template else None
    bos = suite.bos if suite.bos != "auto" else find_bos(scorer, path)
    model = ScoredModel(scorer, first_id=find_first_id(scorer, bos), tokenizer=tokenizer)
    scores: list[Score] = []
    samples: list[dict[str, Any]] = []
    for num_fewshot, loaded in loads.items():
        for task in loaded["tasks"].values():  # every model gets the examples that lm-eval's command draws
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
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
        bos=bos,
        num_trained_tokens=scorer.num_trained_tokens,
        scores=scores,
        samples=samples,
    )


def read_domains(suite: EvaluationSuite) -> list[Domain]:
    """The texts of a suite; raises DataError for what cannot be read, ConfigError for a pair without a tokenizer."""
    encoder = None if suite.tokenizer_model is None else load_encoder(Path(suite.tokenizer_model))
    if encoder is None and (pairs := [name for name, source in suite.domains.items() if is_pair(source)]):
        raise ConfigError(
            f"domains: {pairs[0]} is a .bin/.idx pair, which needs the tokenizer that encoded it, got "
            "tokenizer_model=None. Add it to the suite."
        )
    options = DomainOptions(json_key=suite.json_key, max_documents=suite.max_documents, pair_encoder=encoder)
    return [read_domain(name, source, options) for name, source in suite.domains.items()]


def measure_texts(scorer: Scorer, questions: Questions) -> ModelScores:
    """As the command for perplexity does."""
    options = MeasureOptions(bos=questions.suite.bos)
    return measure_model(scorer, questions.domains, options, reference=questions.references[0])


def score_texts(texts: ModelScores) -> list[Score]:
    """Perplexity and bits per byte; NaN for a domain with a document without a number."""
    scores = []
    for domain in texts.domains:
        estimates = estimate_domain(domain.losses)
        for metric, one in (("perplexity", estimates.perplexity), ("bits_per_byte", estimates.bits_per_byte)):
            error = (one.high - one.low) / NORMAL_INTERVAL
            scores.append(
                Score(
                    task=domain.name,
                    metric=metric,
                    num_fewshot=0,
                    value=one.value,
                    standard_error=None if math.isnan(error) else error,
                    chance=None,
                    num_questions=len(domain.losses.nats),
                )
            )
    return scores


def find_first_id(scorer: Scorer, bos: str) -> int | None:
    """The token of bos or eod; None for none. Raises ConfigError if the tokenizer does not have it."""
    if bos == "none":
        return None
    first_id = scorer.encoder.bos_id if bos == "bos" else scorer.encoder.eod_id
    if first_id is None:
        raise ConfigError(
            f"bos: tokenizer must have the token, got {bos}, which {scorer.encoder.path} lacks. Pass another --bos."
        )
    return first_id


def find_bos(scorer: Scorer, path: Path) -> str:
    """`bos` if the Hugging Face folder of the tokenizer, else of the model, puts BOS before a text; else `none`."""
    from megatron_hammer.evaluation.benchmarks.scored_model import load_tokenizer

    own, bos_id = scorer.encoder.path, scorer.encoder.bos_id
    folders = [
        folder
        for folder in (own if own.is_dir() else own.parent, path)
        if any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))
    ]
    if bos_id is None or own.suffix == ".gguf" or not folders:
        return "none"
    return "bos" if load_tokenizer(folders[0])("A")["input_ids"][:1] == [bos_id] else "none"
