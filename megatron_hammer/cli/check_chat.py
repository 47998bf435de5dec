"""Ask a chat model questions, and see whether it answers in its format and stops.

FILE has one JSON object per line: "question", and where there is only one right answer, "answer"; "kind" groups the
counts. Answers are greedy. A share of answers that end below --min-stopped is an error (exit code 2).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import DataError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, importing
from megatron_hammer.files.tables import build_table, open_console

with importing():
    from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout
    from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions
    from megatron_hammer.platforms.select import select_platform
    from megatron_hammer.post_training.answers import Answer, ask_questions, read_questions


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, or checkpoint of Megatron")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="lines of questions")
    parser.add_argument("--chat-template", help="name of a shipped template, or a Jinja file (default: the model's)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="limit of an answer (%(default)s)")
    parser.add_argument(
        "--min-stopped", type=float, default=0.9, help="least share of answers that end before the limit (%(default)s)"
    )
    parser.add_argument("--show", type=int, default=4, help="answers of each kind to print (%(default)s)")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="device (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1 or arguments.show < 0 or not 0 <= arguments.min_stopped <= 1:
        parser.error(
            "--max-new-tokens must be at least 1, --show at least 0 and --min-stopped from 0 to 1, got "
            f"max_new_tokens={arguments.max_new_tokens}, show={arguments.show}, min_stopped={arguments.min_stopped}"
        )
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints some answers, a table by kind and a summary."""
    arguments = parse_arguments(argv)
    answers = ask_questions(
        arguments.model,
        read_questions(arguments.questions),
        ScorerOptions(layout=ModelLayout(platform=select_platform(arguments.platform))),
        chat_template=arguments.chat_template,
        max_new_tokens=arguments.max_new_tokens,
    )
    if answers is None:  # the first process says it
        return
    print_answers(answers, arguments.show)
    num_stopped = sum(answer.is_stopped for answer in answers)
    if num_stopped < arguments.min_stopped * len(answers):
        raise DataError(
            f"{arguments.model}: must end its turn in {arguments.min_stopped:.0%} of its answers, got {num_stopped} of "
            f"{len(answers)}. Train longer, or look at the masks: hammer show-chat-masks."
        )
    print(f"{arguments.model}: {num_stopped} of {len(answers)} answers end within {arguments.max_new_tokens} tokens")


def print_answers(answers: Sequence[Answer], num_shown: int) -> None:
    """The first answers of each kind, then counts: answers, ended ones, right ones among those with a known answer."""
    kinds = sorted({answer.asked.kind for answer in answers})
    rows = []
    for kind in kinds:
        group = [answer for answer in answers if answer.asked.kind == kind]
        for answer in group[:num_shown]:
            print(f"Q: {answer.asked.question}\nA: {answer.text.strip()}{'' if answer.is_stopped else ' ... (no end)'}")
        known = [answer for answer in group if answer.asked.answer is not None]
        right = f"{sum(answer.is_right for answer in known)} of {len(known)}" if known else "-"
        rows.append((kind, str(len(group)), str(sum(answer.is_stopped for answer in group)), right))
    open_console().print(build_table(None, ("kind", "answers", "ended", "right"), rows))
