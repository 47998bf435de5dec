"""The same questions give the same scores from a Megatron checkpoint, a Hugging Face folder and lm-eval's own class."""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.errors import DataError
from megatron_hammer.evaluation.benchmarks.offline import forbid_network
from megatron_hammer.evaluation.benchmarks.reports import build_report
from megatron_hammer.evaluation.benchmarks.run import Evaluated, Questions, evaluate_model, read_domains, read_questions
from megatron_hammer.evaluation.benchmarks.scores import Score, collect_scores
from megatron_hammer.evaluation.perplexity.formula import estimate_domain
from megatron_hammer.evaluation.perplexity.measure import MeasureOptions, ModelScores, ReferenceTokenizer, measure_model
from megatron_hammer.evaluation.scorers.named_models import NamedModel
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.published_benchmarks import SUBJECT, write_published_data
from tests.helpers.repository import ROOT
from tests.helpers.scored_pair import change_json, write_scored_pair
from tests.helpers.training_runs import run_program

EXAMS = (f"ceval-ppl_{SUBJECT}", f"ceval-gen_{SUBJECT}", "cmmlu-ppl_agronomy", "cmmlu-gen_agronomy")
ENGLISH = ("hellaswag", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "piqa")
TASKS = (*EXAMS, *ENGLISH)
NUM_FEWSHOT = (0, 2)
# Sums of up to 40 log-probabilities, of about 6 each, in fp32: 2e-5 was measured between transformers and Megatron.
TOLERANCE = 2e-4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    forbid_network()
    folder = tmp_path_factory.mktemp("benchmarks")
    write_scored_pair(folder)
    write_published_data(folder / "data")
    return folder


def build_suite(folder: Path, **changes: Any) -> EvaluationSuite:
    return EvaluationSuite(**{"tasks": TASKS, "data_dir": str(folder / "data"), "num_fewshot": NUM_FEWSHOT, **changes})


def evaluate_here(folder: Path, model: str, questions: Questions) -> Evaluated:
    options = ScorerOptions(tokenizer_path=folder / "toy.model")
    evaluated = evaluate_model(NamedModel(folder / model), questions, options)
    assert evaluated is not None
    return evaluated


def evaluate_by_lm_eval(folder: Path, suite: EvaluationSuite, **options: Any) -> tuple[list[Score], list[list[Any]]]:
    """Scores and answers of lm-eval's class for transformers."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from megatron_hammer.evaluation.benchmarks.tasks import load_tasks

    model = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
    # Random weights write bytes that are no UTF-8, which sentencepiece and tokenizers replace differently.
    if not suite.applies_chat_template:
        decode, decode_eos = load_encoder(folder / "toy.model").decode, model.tok_decode
        model.tok_decode = lambda ids, **options: decode_eos(ids, **options) if isinstance(ids, int) else decode(ids)
    scores, answers = [], []
    for num_fewshot in suite.num_fewshot:
        loaded = load_tasks(
            suite.tasks, tasks_dir=None, data_dir=folder / "data", num_fewshot=num_fewshot, runs_code=False
        )
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)  # as its command does
        results = evaluate(lm=model, task_dict=loaded, bootstrap_iters=1000, **options)
        scores += collect_scores(results, loaded, num_fewshot)
        answers += [sample["resps"] for of_task in results["samples"].values() for sample in of_task]
    return scores, answers


def list_values(answers: list[list[Any]]) -> tuple[list[float], list[Any]]:
    """Log-likelihoods, and everything that must be equal: whether they were greedy, and generated texts."""
    flat = [answer for of_question in answers for repeats in of_question for answer in repeats]
    scored = [answer for answer in flat if isinstance(answer, tuple)]
    return [value for value, _ in scored], [is_greedy for _, is_greedy in scored] + [
        answer for answer in flat if isinstance(answer, str)
    ]


@pytest.fixture(scope="module")
def questions(folder: Path) -> Questions:
    """Read once and asked of both models, as the command does."""
    return read_questions(build_suite(folder))


@pytest.fixture(scope="module")
def of_folder(folder: Path, questions: Questions) -> Evaluated:
    return evaluate_here(folder, "hf", questions)


def test_a_folder_scores_as_with_lm_evals_own_class(folder: Path, of_folder: Evaluated) -> None:
    scores, answers = evaluate_by_lm_eval(folder, build_suite(folder))
    values, facts = list_values([sample["resps"] for sample in of_folder.samples])
    expected_values, expected_facts = list_values(answers)
    assert len(values) > 200
    assert values == pytest.approx(expected_values, abs=TOLERANCE)
    assert facts == expected_facts
    assert any(isinstance(fact, str) and fact for fact in facts), "the model writes something"
    assert list(of_folder.scores) == scores


def test_a_checkpoint_scores_as_its_exported_folder(folder: Path, questions: Questions, of_folder: Evaluated) -> None:
    of_checkpoint = evaluate_here(folder, "megatron", questions)
    values, facts = list_values([sample["resps"] for sample in of_checkpoint.samples])
    expected_values, expected_facts = list_values([sample["resps"] for sample in of_folder.samples])
    assert values == pytest.approx(expected_values, abs=TOLERANCE)
    assert facts == expected_facts
    assert of_checkpoint.scores == of_folder.scores


def test_texts_of_a_suite_score_as_with_the_command_for_perplexity(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"content": "a small text"}\n{"content": "and one more of them"}\n{"content": "a third"}\n')
    suite = EvaluationSuite(domains={"english": str(text)}, json_key="content", max_documents=2, bos="eod")
    (domain,) = read_domains(suite)

    def measure(scorer: Scorer) -> ModelScores:
        return measure_model(scorer, [domain], MeasureOptions(bos="eod"), reference=ReferenceTokenizer(scorer.encoder))

    for model in ("hf", "megatron"):
        evaluated = evaluate_here(folder, model, read_questions(suite))
        measured = use_scorer(folder / model, ScorerOptions(tokenizer_path=folder / "toy.model"), measure)
        assert measured is not None
        expected = estimate_domain(measured.domains[0].losses)
        perplexity, bits = evaluated.scores
        assert (perplexity.task, perplexity.metric, bits.metric) == ("english", "perplexity", "bits_per_byte")
        assert (perplexity.value, bits.value) == (expected.perplexity.value, expected.bits_per_byte.value)
        assert bits.num_questions == 2
        assert bits.standard_error is not None
        assert 0 < bits.standard_error < bits.value
        assert any("2 documents of" in note for note in build_report([evaluated], suite)["notes"])
    with pytest.raises(DataError, match="nowhere"):
        read_domains(EvaluationSuite(domains={"zh": "nowhere.jsonl"}))


def test_two_pipeline_stages_give_the_scores_of_one_process(folder: Path, of_folder: Evaluated) -> None:
    suite = folder / "suite.toml"
    tasks = [f"ceval-gen_{SUBJECT}", "winogrande", "arc_easy"]
    suite.write_text(
        f"tasks = {json.dumps(tasks)}\ndata_dir = {json.dumps(str(folder / 'data'))}\nnum_fewshot = [0, 2]\n"
    )
    flags = [
        "--pipeline-model-parallel-size",
        "2",
        "--suite",
        str(suite),
        "--tokenizer-model",
        str(folder / "toy.model"),
    ]
    result = run_program(ROOT / "tools" / "evaluate.py", 2, str(folder / "megatron"), *flags, "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    (model,) = json.loads(result.stdout)["models"]
    expected = [score for score in of_folder.scores if score.task in tasks]
    assert [Score(**score) for score in model["scores"]] == expected
    assert len(expected) == 2 * (1 + 2 + 1)


def test_other_weights_and_another_beginning_are_noticed(folder: Path, of_folder: Evaluated, tmp_path: Path) -> None:
    write_scored_pair(tmp_path, seed=4)
    suite = build_suite(folder, tasks=("openbookqa", "piqa"), num_fewshot=(0,))
    samples = [s for s in of_folder.samples if s["task"] in suite.tasks and s["num_fewshot"] == 0]
    values, _ = list_values([sample["resps"] for sample in samples])
    for evaluated in (
        evaluate_here(tmp_path, "hf", read_questions(suite)),
        evaluate_here(folder, "hf", read_questions(dataclasses.replace(suite, bos="eod"))),
    ):
        others, _ = list_values([sample["resps"] for sample in evaluated.samples])
        differing = [a for a, b in zip(values, others, strict=True) if abs(a - b) > TOLERANCE]
        assert len(differing) > len(values) / 2


def test_texts_begin_as_the_folders_tokenizer_has_them(folder: Path, tmp_path: Path) -> None:
    write_scored_pair(tmp_path)
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<s>": bos}}
    change_json(tmp_path / "hf" / "tokenizer.json", post_processor=template)
    questions = read_questions(build_suite(folder, tasks=("piqa",)))
    assert evaluate_here(tmp_path, "hf", questions).bos == "bos"
    assert evaluate_here(folder, "hf", questions).bos == "none"


@pytest.mark.parametrize("is_multiturn", [True, False])
def test_a_chat_template_is_applied_as_lm_eval_does(folder: Path, tmp_path: Path, is_multiturn: bool) -> None:
    write_scored_pair(tmp_path)
    (tmp_path / "data").symlink_to(folder / "data")
    change_json(tmp_path / "hf" / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    tasks = (f"ceval-ppl_{SUBJECT}", f"ceval-gen_{SUBJECT}")
    suite = build_suite(
        tmp_path, tasks=tasks, num_fewshot=(2,), applies_chat_template=True, has_multiturn_fewshot=is_multiturn
    )
    evaluated = evaluate_model(NamedModel(tmp_path / "hf"), read_questions(suite), ScorerOptions())
    assert evaluated is not None
    _, answers = evaluate_by_lm_eval(tmp_path, suite, apply_chat_template=True, fewshot_as_multiturn=is_multiturn)
    values, facts = list_values([sample["resps"] for sample in evaluated.samples])
    expected_values, expected_facts = list_values(answers)
    assert values == pytest.approx(expected_values, abs=TOLERANCE)
    assert facts == expected_facts
    prompt = evaluated.samples[0]["arguments"][0][0]
    assert prompt.count("<|assistant|>") == (3 if is_multiturn else 1)


def test_no_connection_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    evaluate_here(folder, "hf", read_questions(build_suite(folder, num_fewshot=(0,))))
    assert asked == []
