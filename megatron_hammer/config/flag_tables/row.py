"""A row of the tables of idle flags: which flags have no effect, when, why, and what to do.

Each row follows from where megatron-core 0.19.2 and this package read a flag. A flag may stand in several rows: it has
an effect where none of them says otherwise. `effective.py` has the flags that need no other.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_hammer.config.flags import Flags, flag_of

Condition = Callable[[Flags], bool]
UNREAD = "in megatron-core 0.19, which never reads it"


class Idle(NamedTuple):
    """Flags that have no effect when `is_idle`.

    names: attributes; one that ends in an underscore stands for all that begin so and are neither effective alone nor
    refused.
    """

    names: tuple[str, ...]
    is_idle: Condition
    why: str
    remedy: str


class Refusal(NamedTuple):
    """A flag that Megatron accepts and that would crash or train something else, when `is_asked`."""

    name: str
    is_asked: Condition
    why: str
    remedy: str


def beside(switch: str, names: str, example: str = "") -> Idle:
    """Flags that are read only where `switch` is set; example: a value of the switch, with a space before it."""
    flag = flag_of(switch)
    remedy = f"Pass --{flag}{example} with it, or drop it"
    return Idle(tuple(names.split()), lambda flags: not flags[switch], f"without --{flag}", remedy)


def beside_value(switch: str, values: tuple[str, ...], names: str) -> Idle:
    """Flags that are read only where `switch` has one of these values; the first is named as an example."""
    example = f"--{flag_of(switch)} {values[0]}"
    remedy = f"Pass {example} with it, or drop it"
    return Idle(tuple(names.split()), lambda flags: flags[switch] not in values, f"without {example}", remedy)


def when(is_idle: Condition, why: str, names: str, remedy: str = "Drop it") -> Idle:
    return Idle(tuple(names.split()), is_idle, why, remedy)


def never(why: str, names: str, remedy: str = "Drop it") -> Idle:
    """Flags that have no effect in any run."""
    return Idle(tuple(names.split()), always, why, remedy)


def always(_: Flags) -> bool:
    return True


def is_torch(flags: Flags) -> bool:
    return flags["backend"] == "torch"


def is_te(flags: Flags) -> bool:
    return flags["backend"] == "te"


def is_cpu(flags: Flags) -> bool:
    return flags["platform"] == "cpu"
