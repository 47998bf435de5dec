#!/usr/bin/env python3
"""Speculative decoding with a draft model in llama.cpp: how often the draft is right, and whether anything is gained.

    python benchmarks/speculative.py --target large.gguf --draft small.gguf --input texts.jsonl

Every document of --input is cut to --prompt-tokens and continued greedily for --num-tokens: by the target alone, and
with the draft for each of --draft-tokens, all in turn, every second round in the reverse order; each is a process of
its own that stays loaded. Prompts are computed before the measurement. A speed is the ratio to the target alone. It is
computed from the CPU time of the process, which other work on the machine hardly disturbs; with the one thread of the
default it is the time on an idle machine. Wall is the same ratio by llama.cpp's own clock, of the fastest round of each
prompt. The target as its own draft is the upper limit of acceptance.

Tokens per pass are the generated tokens divided by the target's passes. Draft cost is the time of one token of the
draft alone, in tokens of the target alone. Pass cost is the time in which the target computes all proposed tokens and
one more at once, in the same unit; all in CPU time. From these three the expected speed follows, and the break-even:
the draft cost at which nothing is gained (megatron_hammer/serving/speculative.py). The effective draft cost is the one
that explains the measured speed; it has in it what llama.cpp does beside both models. All are given; where they
disagree, the measured speed is what a user gets.

Prediction, written before the first run: a draft that is right in half of all cases gains nothing on two CPU cores,
because a pass over five tokens costs far more than one over a single token there.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil

from megatron_hammer.checkpoint.gguf.llama_cpp import LlamaCpp, open_llama_cpp
from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.tables import build_table, open_console
from megatron_hammer.serving.speculative import (
    DraftOptions,
    build_draft_parameters,
    compute_break_even_cost,
    estimate_speedup,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One answer. num_proposed: tokens of the draft, of which num_accepted were in the answer.

    elapsed_ms: by llama.cpp's clock. cpu_ms: of its process.
    """

    elapsed_ms: float
    cpu_ms: float
    text: str
    num_proposed: int
    num_accepted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A draft and a number of tokens that it proposes; costs in tokens of the target alone."""

    draft: str
    draft_tokens: int
    acceptance: float
    tokens_per_pass: float
    speed: float
    wall_speed: float
    expected_speed: float
    draft_cost: float
    effective_draft_cost: float
    break_even_cost: float
    pass_cost: float
    num_equal: int
    num_answers: int


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--target", type=Path, required=True, help="GGUF file of the large model")
    parser.add_argument("--draft", type=Path, nargs="+", required=True, help="GGUF files of smaller models")
    parser.add_argument("--input", nargs="+", required=True, help="documents whose beginnings are the prompts")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 2, 4, 8], help="proposed at a time")
    parser.add_argument("--prompts", type=int, default=4, help="documents (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--num-tokens", type=int, default=96, help="generated per answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each model (%(default)s)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Side:
    """A running llama.cpp and the id of its process."""

    def __init__(self, stack: contextlib.ExitStack, path: Path, context: int, threads: int, more: dict[str, object]):
        before = set(psutil.Process().children())
        self.llama_cpp: LlamaCpp = stack.enter_context(
            open_llama_cpp(path, num_context_tokens=context, num_threads=threads, more=more)
        )
        (child,) = set(psutil.Process().children()) - before
        self._tasks = Path(f"/proc/{child.pid}/task")

    def read_cpu_ms(self) -> float:
        """CPU time of all its threads so far; the first number of schedstat is in nanoseconds."""
        return sum(int((task / "schedstat").read_text().split()[0]) for task in self._tasks.iterdir()) / 1e6

    def ask(self, prompt: list[int], num_tokens: int) -> Measured:
        """Continue a prompt that was computed before."""
        self.llama_cpp.continue_text(prompt, num_tokens=1, reuses_prompt=True)
        started_ms = self.read_cpu_ms()
        answer = self.llama_cpp.continue_text(prompt, num_tokens=num_tokens, reuses_prompt=True)
        timings = answer["timings"]
        return Measured(
            elapsed_ms=timings["predicted_ms"],
            cpu_ms=self.read_cpu_ms() - started_ms,
            text=answer["content"],
            num_proposed=timings.get("draft_n", 0),
            num_accepted=timings.get("draft_n_accepted", 0),
        )

    def time_pass(self, prompt: list[int], num_tokens: int) -> float:
        """CPU ms in which it reads the last `num_tokens` tokens of a prompt at once."""
        self.llama_cpp.continue_text(prompt[:-num_tokens], num_tokens=1)
        started_ms = self.read_cpu_ms()
        timings = self.llama_cpp.continue_text(prompt, num_tokens=1, reuses_prompt=True)["timings"]
        # llama.cpp may compute more than the new tokens again.
        return (self.read_cpu_ms() - started_ms) * num_tokens / float(timings["prompt_n"])


@exit_on_user_error
def main() -> None:
    arguments = parse_arguments()
    context = arguments.prompt_tokens + arguments.num_tokens + max(arguments.draft_tokens) + 1
    with contextlib.ExitStack() as stack:

        def start(path: Path, draft: DraftOptions | None = None) -> Side:
            more: dict[str, object] = {}
            if draft is not None:
                more = build_draft_parameters(path, draft, context_tokens=context, num_threads=arguments.threads)
            return Side(stack, path, context, arguments.threads, more)

        target = start(arguments.target)
        drafts = {path: start(path) for path in arguments.draft}
        pairs = {
            (path, count): start(arguments.target, DraftOptions(path=path, num_tokens=count))
            for path in (*arguments.draft, arguments.target)
            for count in arguments.draft_tokens
        }
        prompts = read_prompts(arguments, target.llama_cpp)
        rows = measure(arguments, target, drafts, pairs, prompts)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    open_console().print(build_report(rows))


def read_prompts(arguments: argparse.Namespace, target: LlamaCpp) -> list[list[int]]:
    documents = islice(read_documents(arguments.input), arguments.prompts)
    prompts = [target.tokenize(document.text, adds_ends=False)[: arguments.prompt_tokens] for document in documents]
    prompts = [prompt for prompt in prompts if len(prompt) == arguments.prompt_tokens]
    if not prompts:
        raise ConfigError(
            f"input: documents must have {arguments.prompt_tokens} tokens, got none that has. Pass longer ones."
        )
    return prompts


def measure(
    arguments: argparse.Namespace,
    target: Side,
    drafts: dict[Path, Side],
    pairs: dict[tuple[Path, int], Side],
    prompts: list[list[int]],
) -> list[Row]:
    sides: dict[object, Side] = {"target": target, **drafts, **pairs}
    answers: dict[object, list[Measured]] = {key: [] for key in sides}
    pass_ms: dict[int, list[float]] = {count: [] for count in (0, *arguments.draft_tokens)}
    for number in range(arguments.rounds):
        order = list(sides.items())
        for prompt in prompts:
            for key, side in order if number % 2 == 0 else reversed(order):
                answers[key].append(side.ask(prompt, arguments.num_tokens))
            for count, times in pass_ms.items():
                times.append(target.time_pass(prompt, count + 1))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    alone = answers["target"]
    # The target as its own draft costs as much as itself.
    draft_costs = {path: sum_cpu(answers[path]) / sum_cpu(alone) for path in drafts} | {arguments.target: 1.0}
    return [
        build_row(
            pair,
            answers[pair],
            alone,
            num_tokens=arguments.num_tokens,
            num_prompts=len(prompts),
            draft_cost=draft_costs[pair[0]],
            pass_cost=min(pass_ms[pair[1]]) / min(pass_ms[0]),
        )
        for pair in pairs
    ]


def sum_cpu(answers: list[Measured]) -> float:
    return sum(one.cpu_ms for one in answers)


def sum_fastest(answers: list[Measured], num_prompts: int) -> float:
    """ms of all prompts, each in its fastest round. answers: of round after round."""
    return sum(min(one.elapsed_ms for one in answers[prompt::num_prompts]) for prompt in range(num_prompts))


def build_row(
    pair: tuple[Path, int],
    answers: list[Measured],
    alone: list[Measured],
    *,
    num_tokens: int,
    num_prompts: int,
    draft_cost: float,
    pass_cost: float,
) -> Row:
    path, count = pair
    speed = sum_cpu(alone) / sum_cpu(answers)
    proposed, accepted = (sum(getattr(one, f"num_{name}") for one in answers) for name in ("proposed", "accepted"))
    # Every pass gives the accepted tokens and one of its own.
    tokens_per_pass = num_tokens * len(answers) / (num_tokens * len(answers) - accepted)
    return Row(
        draft=path.stem,
        draft_tokens=count,
        acceptance=accepted / max(1, proposed),
        tokens_per_pass=tokens_per_pass,
        speed=speed,
        wall_speed=sum_fastest(alone, num_prompts) / sum_fastest(answers, num_prompts),
        expected_speed=estimate_speedup(tokens_per_pass, count, draft_cost=draft_cost, verification_cost=pass_cost),
        draft_cost=draft_cost,
        effective_draft_cost=(tokens_per_pass / speed - pass_cost) / count,
        break_even_cost=compute_break_even_cost(tokens_per_pass, count, verification_cost=pass_cost),
        pass_cost=pass_cost,
        num_equal=sum(one.text == other.text for one, other in zip(alone, answers, strict=True)),
        num_answers=len(answers),
    )


def build_report(rows: list[Row]) -> object:
    columns = (
        *("draft", "proposed", "accepted", "tokens per pass", "pass cost", "draft cost", "effective", "break-even"),
        *("speed", "expected", "wall", "same answers"),
    )
    cells = (
        (
            row.draft,
            str(row.draft_tokens),
            f"{row.acceptance:.0%}",
            f"{row.tokens_per_pass:.2f}",
            f"{row.pass_cost:.2f}",
            f"{row.draft_cost:.2f}",
            f"{row.effective_draft_cost:.2f}",
            f"{row.break_even_cost:.2f}",
            f"{row.speed:.2f}",
            f"{row.expected_speed:.2f}",
            f"{row.wall_speed:.2f}",
            f"{row.num_equal} of {row.num_answers}",
        )
        for row in rows
    )
    return build_table(None, columns, cells)


if __name__ == "__main__":
    main()
