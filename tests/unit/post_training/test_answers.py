"""Questions to a chat model: read, asked in its template, and counted by whether the answer ends and is right."""

import json
from pathlib import Path

import pytest
import torch

from megatron_hammer.cli.check_chat import main
from megatron_hammer.errors import DataError
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions
from megatron_hammer.post_training.answers import Answer, Question, ask_questions, read_questions
from megatron_hammer.post_training.templates.chat_template import load_chat_template
from tests.helpers.toy_chat_model import write_chat_model
from tests.helpers.toy_hf_folder import write_toy_folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says the token `ox` after a line end, and <|im_end|> after that, whatever stands before."""
    folder = write_chat_model(tmp_path_factory.mktemp("model") / "chat")
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    line_end, ox, end = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("\n", "fox", "<|im_end|>"))
    weights = {name: torch.zeros_like(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    # With zeroed layers the hidden state is the embedding; norms of 1 keep its direction.
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    for number, (token, following) in enumerate(((line_end, ox), (ox, end))):
        embeddings[token, number] = 1.0
        head[following, number] = 1.0
    config = json.loads((folder / "config.json").read_text())
    write_toy_folder(folder, weights=weights, **config)
    (folder / "chat_template.jinja").write_text(load_chat_template("chatml").text)
    return folder


def test_answers_end_and_are_compared(chat_model: Path) -> None:
    questions = [Question(question="the dog", answer=" ox "), Question(question="the fox", answer="dog", kind="b")]
    answers = ask_questions(chat_model, questions, ScorerOptions(), chat_template=None, max_new_tokens=2)
    assert answers == [Answer(questions[0], "ox", True), Answer(questions[1], "ox", True)]
    assert [answer.is_right for answer in answers] == [True, False]
    cut = ask_questions(chat_model, questions, ScorerOptions(), chat_template="chatml", max_new_tokens=1)
    assert cut is not None
    assert [(answer.text, answer.is_stopped, answer.is_right) for answer in cut] == [("ox", False, False)] * 2


def test_a_question_that_does_not_fit_the_model_is_named(chat_model: Path) -> None:
    questions = [Question(question="the dog"), Question(question="fox " * 500)]
    with pytest.raises(DataError, match=r"question 2: must have at most the \d+ tokens that chat reads, got [\d,]+"):
        ask_questions(chat_model, questions, ScorerOptions(), chat_template=None, max_new_tokens=2)


def test_the_command_fails_where_answers_do_not_end(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "the dog", "answer": "ox", "kind": "animal"}\n{"question": "the fox"}\n')
    flags = ["--model", str(chat_model), "--questions", str(path), "--platform", "cpu"]
    main(flags)
    told = capsys.readouterr().out
    assert "Q: the dog\nA: ox\n" in told
    assert [line.split() for line in told.splitlines() if line.strip().startswith(("all", "animal"))] == [
        ["all", "1", "1", "-"],
        ["animal", "1", "1", "1", "of", "1"],
    ]
    assert told.splitlines()[-1].endswith("2 of 2 answers end within 128 tokens")
    with pytest.raises(SystemExit) as caught:
        main([*flags, "--max-new-tokens", "1"])
    assert caught.value.code == 2
    problem = capsys.readouterr().err
    assert "must end its turn in 90% of its answers, got 0 of 2" in problem


def test_a_file_of_no_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="must hold a question, got an empty file"):
        read_questions(path)
    path.write_text('{"answer": "a"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1: question must be given"):
        read_questions(path)


@pytest.mark.parametrize("line", ['{"question": "a", "anwser": "b"}', '{"question": "a", "answer": "b"'])
def test_neither_a_field_nor_a_last_line_is_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"question": "a"}} \n\n{line}')
    with pytest.raises(DataError, match=r"questions\.jsonl:3: (anwser must be a known field|content must be JSON)"):
        read_questions(path)
    path.write_text('{"question": "a"} \n\n{"question": "b"} \n')
    assert [one.question for one in read_questions(path)] == ["a", "b"]
