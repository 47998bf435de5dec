"""Which .bin/.idx prefixes a run reads, for which split and with what weight: the data flags, read strictly.

Megatron reads the same flags in megatron.training.utils.get_blend_and_blend_per_split and
megatron.core.datasets.utils.get_blend_from_list, which take any list that is not clearly weighted as prefixes alone.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

SPLIT_NAMES = ("train", "valid", "test")
SPLIT_FLAGS = {"train": "train_data_path", "valid": "valid_data_path", "test": "test_data_path"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One prefix of a blend. weight: as given, or None where Megatron goes by size."""

    prefix: str
    weight: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPlan:
    """What a run reads: `shared` sources, each cut by `split` into train, valid and test shares, or `own` blends."""

    is_mock: bool = False
    shared: tuple[DataSource, ...] = ()
    split: tuple[float, float, float] | None = None
    own: dict[str, tuple[DataSource, ...]] | None = None

    def sources_of(self, split_name: str) -> tuple[DataSource, ...]:
        """The blend of "train", "valid" or "test"; empty where there is none."""
        if self.own is not None:
            return self.own.get(split_name, ())
        has_share = self.split is not None and self.split[SPLIT_NAMES.index(split_name)] > 0
        return self.shared if has_share else ()

    def bounds_of(self, split_name: str) -> tuple[float, float]:
        """Where a split lies in each source, as shares of its sequences."""
        if self.split is None:
            return 0.0, 1.0
        index = SPLIT_NAMES.index(split_name)
        return sum(self.split[:index]), sum(self.split[: index + 1])


def list_data_flags(namespace: argparse.Namespace) -> list[str]:
    """The flags that name data, of those that are set."""
    values = {
        "--mock-data": namespace.mock_data or None,
        "--data-path": namespace.data_path,
        "--data-args-path": namespace.data_args_path,
        "--per-split-data-args-path": namespace.per_split_data_args_path,
    }
    values |= {f"--{name.replace('_', '-')}": getattr(namespace, name) for name in SPLIT_FLAGS.values()}
    return [flag for flag, value in values.items() if value is not None]


def read_data_plan(namespace: argparse.Namespace) -> tuple[DataPlan, list[str]]:
    """The data flags as a plan, and what is wrong with them; the plan is empty where they contradict each other."""
    given = list_data_flags(namespace)
    ways = {
        "per split" if flag in ("--train-data-path", "--valid-data-path", "--test-data-path") else flag
        for flag in given
    }
    if not ways:
        return DataPlan(), [
            "data-path: a run needs data, got none (Megatron would train on random tokens). "
            "Pass --data-path PREFIX, or --mock-data to mean random tokens."
        ]
    if len(ways) > 1:
        return DataPlan(), [
            f"data-path: data comes from one place, got {', '.join(given)}. "
            "Pass --data-path with --split, or --train-data-path, --valid-data-path and --test-data-path."
        ]
    if namespace.mock_data:
        return DataPlan(is_mock=True), []
    if namespace.data_path is not None:
        return _read_shared(namespace, "data-path", namespace.data_path)
    if namespace.data_args_path is not None:
        words, problems = _read_words("data-args-path", namespace.data_args_path)
        return (DataPlan(), problems) if problems else _read_shared(namespace, "data-args-path", words)
    return _read_own(namespace)


def _read_shared(namespace: argparse.Namespace, flag: str, words: list[str]) -> tuple[DataPlan, list[str]]:
    sources, problems = parse_blend(flag, words)
    split, split_problems = parse_split(namespace.split)
    return DataPlan(shared=sources, split=split), problems + split_problems


def _read_own(namespace: argparse.Namespace) -> tuple[DataPlan, list[str]]:
    problems = []
    if namespace.split is not None:
        problems.append(
            f"split: cannot be combined with a data set for each split, got split={namespace.split}. Drop --split."
        )
    lists: dict[str, list[str] | None] = {name: getattr(namespace, flag) for name, flag in SPLIT_FLAGS.items()}
    if namespace.per_split_data_args_path is not None:
        lists, file_problems = _read_split_file(namespace.per_split_data_args_path)
        problems += file_problems
    own = {}
    for name, words in lists.items():
        if words:
            own[name], blend_problems = parse_blend(SPLIT_FLAGS[name].replace("_", "-"), words)
            problems += blend_problems
    if "train" not in own and not namespace.skip_train and not problems:
        problems.append("train-data-path: training needs a data set, got none. Pass --train-data-path PREFIX.")
    return DataPlan(own=own), problems


def parse_blend(flag: str, words: list[str]) -> tuple[tuple[DataSource, ...], list[str]]:
    """Prefixes alone, or weights and prefixes in turn; anything between the two is a problem."""
    if not words or not all(word.strip() for word in words):
        return (), [f"{flag}: must name prefixes, got {words}. Pass --{flag} PREFIX."]
    numbers = [_read_number(word) for word in words]
    if all(number is None for number in numbers):
        return tuple(DataSource(prefix=word.strip(), weight=None) for word in words), []
    is_in_turn = len(words) % 2 == 0 and all(
        (number is not None) == (position % 2 == 0) for position, number in enumerate(numbers)
    )
    if not is_in_turn:
        return (), [
            f"{flag}: must be prefixes alone, or a weight before every prefix, got {' '.join(words)}. "
            "Write it as: 0.7 PREFIX_A 0.3 PREFIX_B."
        ]
    sources = tuple(
        DataSource(prefix=prefix.strip(), weight=weight)
        for weight, prefix in zip(numbers[::2], words[1::2], strict=True)
    )
    return sources, [
        f"{flag}: weights must be positive and finite, got weight={source.weight} for {source.prefix}. "
        "Give it a weight, or leave it out."
        for source in sources
        if source.weight is None or not 0 < source.weight < math.inf
    ]


def parse_split(text: str | None) -> tuple[tuple[float, float, float] | None, list[str]]:
    """'98,2,0' as shares of one; Megatron's own reader drops signs and every character that it does not know."""
    numbers = [_read_number(part) for part in re.split(r"[,/]", text or "")]
    is_valid = 1 <= len(numbers) <= 3 and all(number is not None and 0 <= number < math.inf for number in numbers)
    # Megatron finds numbers by the pattern [.0-9]+, so 1e2 would be two of them.
    is_plain = re.fullmatch(r"[\s.0-9,/]+", text or "") is not None
    shares = [number or 0.0 for number in numbers] + [0.0] * (3 - len(numbers))
    if not is_valid or not is_plain or sum(shares) == 0 or shares[0] == 0:
        return None, [
            f"split: must be three shares for training, validation and test, the first above 0, got split={text}. "
            "Write it as 98,2,0."
        ]
    total = sum(shares)
    return (shares[0] / total, shares[1] / total, shares[2] / total), []


def _read_words(flag: str, path: str) -> tuple[list[str], list[str]]:
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        return [], [f"{flag}: must be a text file of prefixes, got {path} ({error}). Check the path."]
    return words, [] if words else [f"{flag}: must name prefixes, got an empty file {path}. Write one on each line."]


def _read_split_file(path: str) -> tuple[dict[str, list[str] | None], list[str]]:
    """{"train": [...] or "a b", "valid": ..., "test": ...}; Megatron needs all three keys."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = {name: content[name] for name in SPLIT_NAMES}
        for name, value in lists.items():
            is_list = isinstance(value, list) and all(isinstance(word, str) for word in value)
            if not (value is None or isinstance(value, str) or is_list):
                raise TypeError(f"{name} is neither a list of strings nor null")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [
            f"per-split-data-args-path: must be a JSON object with the keys train, valid and test, got {path} "
            f"({type(error).__name__}: {error}). Use null for a split without data."
        ]
    return {name: words.split() if isinstance(words, str) else words for name, words in lists.items()}, []


def _read_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
