"""Does a chat model answer in its format and stop? Greedy answers to questions, from a model of any kind.

A model that has not learned to stop talks until the limit, in every engine; no loss shows it as plainly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.data.conversations.formats import Conversation
from megatron_hammer.errors import DataError
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer
from megatron_hammer.files.read import read_bytes
from megatron_hammer.files.typed import parse_json
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.post_training.templates.model_template import open_chat_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A line of a file of questions. answer: the only right one, if there is one. kind: under which it is counted."""

    question: str
    answer: str | None = None
    kind: str = "all"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said before the end of its turn, or before the limit. is_stopped: whether it ended its turn."""

    asked: Question
    text: str
    is_stopped: bool

    @property
    def is_right(self) -> bool:
        return self.is_stopped and self.asked.answer is not None and self.text.strip() == self.asked.answer.strip()


def read_questions(path: Path) -> list[Question]:
    """Read {"question", "answer", "kind"} lines; raises DataError for any other line, and for a file without one."""
    lines = read_bytes(path).splitlines()
    questions = [
        parse_json(line, Question, where=f"{path}:{number}", remedy="Repair the line.", allows_unknown=False)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise DataError(f"{path}: must hold a question, got an empty file. Check the path.")
    return questions


def ask_questions(
    model: Path,
    questions: Sequence[Question],
    options: ScorerOptions,
    *,
    chat_template: str | None,
    max_new_tokens: int,
) -> list[Answer] | None:
    """Greedy answers of a Hugging Face folder or a checkpoint of Megatron; None on other ranks than the first.

    chat_template: a shipped name or a file; None: the model's own. Raises ConfigError or DataError where it does not
    fit the tokenizer.
    """

    def ask(scorer: Scorer) -> list[Answer]:
        tokenizer, ends = open_chat_tokenizer(model, scorer.encoder.path, chat_template=chat_template)
        prompts = [_encode_prompt(tokenizer, one.question) for one in questions]
        for number, prompt in enumerate(prompts, start=1):
            if len(prompt) > scorer.max_length:
                raise DataError(
                    f"question {number}: must have at most the {scorer.max_length:,} tokens that {scorer.name} reads, "
                    f"got {len(prompt):,}. Shorten it."
                )
        answers = scorer.generate(prompts, max_new_tokens=max_new_tokens, is_done=lambda new: new[-1] in ends)
        return [
            Answer(one, scorer.encoder.decode([token for token in new if token not in ends]), new[-1] in ends)
            for one, new in zip(questions, answers, strict=True)
        ]

    return use_scorer(model, options, ask)


def _encode_prompt(tokenizer: ChatTokenizer, question: str) -> list[int]:
    """As a server does: the rendered text, in which control tokens are found."""
    conversation = Conversation([{"role": "user", "content": question}])
    text, _ = tokenizer.render(conversation, add_generation_prompt=True)
    ids: list[int] = tokenizer.plain.encode(text, add_special_tokens=False).ids
    return ids
