from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_hammer.errors import CheckpointError, ConfigError
from megatron_hammer.evaluation.benchmarks.scored_model import ScoredModel, load_chat_tokenizer
from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores

BOS, EOD = 1, 2


class Letters:
    """A tokenizer of one token for each character."""

    path, sha256, bos_id, eod_id, vocab_size = Path("letters"), "0", BOS, EOD, 200

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) for letter in text], dtype=np.int32)

    def decode(self, ids: Any) -> str:
        return "".join(chr(token) for token in ids)


class CountingScorer(Scorer):
    """Every token has the log-probability -0.5, and is greedy if it is "a"; it writes "xyz" and EOD."""

    name, max_length, precision = "counting", 8, "fp32"

    def __init__(self) -> None:
        self.encoder, self.asked = Letters(), []  # type: ignore[assignment]

    def score(self, sequences: Any, num_targets: Any = None) -> list[TokenScores]:
        counts = self.count_targets(sequences, num_targets)
        self.asked += [(list(ids), count) for ids, count in zip(sequences, counts, strict=True)]
        return [
            TokenScores(np.full(count, -0.5), np.array(ids[-count:]) == ord("a"))
            for ids, count in zip(sequences, counts, strict=True)
        ]

    def choose_next(self, sequences: Any) -> list[int]:
        self.asked += [(list(ids), 0) for ids in sequences]
        following = {ord("x"): ord("y"), ord("y"): ord("z"), ord("z"): EOD}
        return [following.get(ids[-1], ord("x")) for ids in sequences]


def build(**options: Any) -> tuple[ScoredModel, CountingScorer]:
    scorer = CountingScorer()
    return ScoredModel(scorer, **{"first_id": None, **options}), scorer


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_a_log_has_no_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = build()
    model.loglikelihood([request("q", "a")])
    assert "Tokenizing" not in capsys.readouterr().err


def test_only_the_answer_is_scored_after_what_fits_of_its_context() -> None:
    model, scorer = build(first_id=BOS)
    assert model.loglikelihood([request("qq", "aa"), request("qq", "ab")], disable_tqdm=True) == [
        (-1.0, True), (-1.0, False),
    ]  # fmt: skip
    assert ([BOS, *map(ord, "qqaa")], 2) in scorer.asked
    scorer.asked.clear()
    model.loglikelihood([request("0123456789", "aa")], disable_tqdm=True)
    assert scorer.asked == [([*map(ord, "3456789"), *map(ord, "aa")], 2)], "max_length + 1 tokens, from the right"


def test_a_text_without_context_is_scored_after_bos() -> None:
    model, scorer = build()
    model.loglikelihood([request("", "ab")], disable_tqdm=True)
    assert scorer.asked == [([BOS, *map(ord, "ab")], 2)]


def test_equal_questions_are_computed_once() -> None:
    model, scorer = build()
    assert len(model.loglikelihood([request("q", "a")] * 5, disable_tqdm=True)) == 5
    assert len(scorer.asked) == 1


def test_every_token_of_a_long_text_is_scored_once() -> None:
    model, scorer = build()
    assert model.loglikelihood_rolling([request("a" * 20), request("b")]) == [-10.0, -0.5]
    assert sum(count for _, count in scorer.asked) in (20, 21)


def test_generation_ends_at_a_stop_sequence_or_at_eod() -> None:
    model, scorer = build()
    options = {"until": ["z"], "max_gen_toks": 5}
    assert model.generate_until([request("q", options), request("q", {**options, "until": []})]) == ["xy", "xyz"]
    assert model.generate_until([request("q", {"until": [], "max_gen_toks": 2})]) == ["xy"]
    scorer.asked.clear()
    model.generate_until([request("0123456789", {"until": ["x"], "max_gen_toks": 5})])
    assert scorer.asked[1] == ([*map(ord, "789")], 0), "room for the new tokens"


def test_what_cannot_be_answered_is_refused() -> None:
    model, _ = build()
    with pytest.raises(ConfigError, match="an answer must have 1 to 8 tokens after its context, got 9"):
        model.loglikelihood([request("q", "a" * 9)], disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"generation must be greedy, got do_sample with temperature 0.7"):
        model.generate_until([request("q", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(ConfigError, match=r"fewer than the 8 that the model reads, got 8.*--max-new-tokens"):
        model.generate_until([request("q", {"max_gen_toks": 8})])


def test_a_template_without_a_system_role_gets_its_words_from_the_user() -> None:
    from jinja2 import TemplateError

    def render(messages: list[dict[str, str]], **options: Any) -> str:
        if messages[0]["role"] == "system":
            raise TemplateError("no system role")
        return "|".join(f"{message['role']}: {message['content']}" for message in messages)

    model, _ = build(tokenizer=SimpleNamespace(apply_chat_template=render, bos_token=None))
    turns = [{"role": "system", "content": "Exam.\n"}, {"role": "user", "content": "1 + 1?"}]
    assert model.apply_chat_template(turns) == "user: Exam.\n1 + 1?"


def test_a_folder_without_a_chat_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transformers must load the tokenizer"):
        load_chat_tokenizer(tmp_path)


def test_a_model_that_computes_nan_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build()
    monkeypatch.setattr(
        CountingScorer,
        "score",
        lambda self, sequences, num_targets=None: [
            TokenScores(np.full(1, np.nan), np.zeros(1, dtype=bool)) for _ in sequences
        ],
    )
    with pytest.raises(CheckpointError, match="counting: log-probabilities must be numbers, got NaN"):
        model.loglikelihood([request("qq", "a")], disable_tqdm=True)
    with pytest.raises(CheckpointError, match="got NaN"):
        model.generate_until([request("qq", {"until": ["z"], "max_gen_toks": 3, "do_sample": False})])


def test_an_id_behind_the_tokens_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scorer = build()
    monkeypatch.setattr(scorer.encoder, "vocab_size", ord("z"), raising=False)
    asked = {"until": ["zz"], "max_gen_toks": 3, "do_sample": False}
    assert model.generate_until([request("q", asked)]) == ["xy"]


def test_an_empty_answer_is_named() -> None:
    model, _ = build()
    with pytest.raises(ConfigError, match="an answer must have a token, got an empty one"):
        model.loglikelihood([request("qq", "")], disable_tqdm=True)
