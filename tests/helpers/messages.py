"""Compare messages to users by their facts and not by their wording, which must stay free to improve."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from megatron_hammer.errors import HammerError


def assert_problem(problem: str, field: str, *facts: str) -> None:
    """The message begins with its field or place, and holds the facts.

    Facts are the value, and the few words that tell this problem from another problem of the same field.
    """
    assert "\n" not in problem, f"one problem was expected, got several: {problem}"
    assert problem.startswith(field), f"{problem!r} does not begin with {field!r}"
    missing = [fact for fact in facts if not _holds(problem, fact)]
    assert not missing, f"{problem!r} lacks {missing}"


def _holds(problem: str, fact: str) -> bool:
    """A number at an end of the fact is a whole number of the problem: `got 1` is not found in `got 10`."""
    before = r"(?<!\d)" if fact[:1].isdigit() else ""
    after = r"(?![,.]?\d)" if fact[-1:].isdigit() else ""
    return re.search(before + re.escape(fact) + after, problem) is not None


def assert_problems(problems: Iterable[str], *expected: tuple[str, ...]) -> None:
    """Exactly these problems in this order, each as (field, *facts)."""
    problems = list(problems)
    assert len(problems) == len(expected), problems
    for problem, parts in zip(problems, expected, strict=True):
        assert_problem(problem, *parts)


@contextmanager
def raises_problem(kind: type[HammerError], field: str, *facts: str) -> Iterator[None]:
    """The block raises this error with this one problem."""
    with pytest.raises(kind) as caught:
        yield
    assert_problems(caught.value.problems, (field, *facts))


def assert_errors(stderr: str, *expected: tuple[str, ...]) -> None:
    """A command printed exactly these problems as its errors, each as (field, *facts), and nothing else."""
    assert_problems(stderr.splitlines(), *((f"error: {field}", *facts) for field, *facts in expected))
