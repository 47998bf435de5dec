"""What is known about a coefficient before any run."""

from typing import NamedTuple


class Prior(NamedTuple):
    """`spread` is the standard deviation of the coefficient's logarithm; low and high are bounds."""

    value: float
    low: float
    high: float
    spread: float
