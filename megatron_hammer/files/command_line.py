"""How a command begins: its large imports, and its parser, which has numbers that are numbers and short complaints."""

import argparse
import gc
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError

# argparse takes a word that begins with a hyphen for a flag unless it looks like a number. Its own pattern knows no
# exponents (-1e-3), no infinities and no NaN, so these would be reported as a missing value.
NEGATIVE_NUMBER = re.compile(r"-((\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?|inf|infinity|nan)$", re.IGNORECASE)
# Of 64 bits. Larger numbers overflow in numpy, or keep a search busy for ever.
LARGEST_INTEGER = 2**63 - 1


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries in this block, a quarter faster: Python searches what they make for garbage only once.

    Nearly all of it stays until the end of the process. The search is repeated as the number of objects grows, and once
    more at exit, which gc.freeze() prevents.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # triton reports the objects that are still there at exit, line by line.
        if "triton" not in sys.modules:
            gc.freeze()
        if was_enabled:
            gc.enable()


class _Store(argparse.Action):
    """argparse's own, except that of `--input a --input b` it would keep b alone."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before: Any = getattr(namespace, self.dest, None)
        # None: `refuse_idle` parses without the defaults.
        if self.option_strings and self.nargs in ("+", "*") and before is not None and before is not self.default:
            values = [*before, *values]
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """argparse that raises ConfigError with one line, where argparse prints the whole usage and exits.

    Values of `type=float` must be finite, those of `type=int` fit in 64 bits and those of `type=Path` not be empty,
    without a word at each flag. A flag that takes a list and is given again adds to it.
    """

    def __init__(self, description: str | None = None, **options: Any):
        # Raw: our descriptions are module docstrings with examples, which must keep their lines.
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)
        self._negative_number_matcher = NEGATIVE_NUMBER
        self.register("action", None, _Store)
        self.register("type", float, parse_finite_number)
        self.register("type", int, parse_integer)
        self.register("type", Path, parse_path)

    def refuse_idle(self, argv: Sequence[str] | None, needs: Mapping[str, str]) -> None:
        """Raise ConfigError for a flag that is typed without another one, without which it has no effect.

        needs: the other one by the flag, both as attributes of the arguments; "a or b" where either will do.
        """
        # Without defaults: a flag that is typed with its default value counts too.
        undecided = argparse.Namespace(**{action.dest: None for action in self._actions})
        typed = {name: value for name, value in vars(self.parse_args(argv, undecided)).items() if value is not None}
        for name, needed in needs.items():
            if name in typed and typed.keys().isdisjoint(needed.split(" or ")):
                flag, others = (f"--{words}".replace("_", "-").replace(" or ", " or --") for words in (name, needed))
                self.error(f"{flag} needs {others}, got {name}={typed[name]} alone")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except KeyError:  # of a type that looks names up, as Megatron's enumerations do; argparse expects ValueError
            names = ", ".join(str(getattr(choice, "name", choice)) for choice in action.choices or ())
            known = f"one of {names}" if names else "a name that it knows"
            raise argparse.ArgumentError(action, f"must be {known}, got {text!r}") from None

    def error(self, message: str) -> Any:
        raise ConfigError(f"command line: {message}. See --help.")


def parse_finite_number(text: str) -> float:
    """float(text); ArgumentTypeError unless it is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def parse_integer(text: str) -> int:
    """int(text); ArgumentTypeError unless it is a whole number of at most 64 bits."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if abs(value) > LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_INTEGER}, got {text!r}")
    return value


def parse_path(text: str) -> Path:
    """Path(text); ArgumentTypeError for no text, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''. Is a variable of the shell not set?")
    return Path(text)


def parse_new_name(text: str) -> Path:
    """Path(text) of a file or prefix to be written; ArgumentTypeError for the spelling of a folder, `data/` or `..`."""
    path = parse_path(text)
    # pathlib drops a slash at the end, and the name of the folder would become that of the output.
    if os.path.basename(text) in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"must end in a name, got {text!r}. Pass {os.path.join(text, 'NAME')}")
    return path
