"""Which .bin/.idx prefixes a run reads, for which split and with what weight, and how many tokens each split holds."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.data.indexed.pair import IndexSummary

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
        # A share of 0 is no data set: Megatron builds None there.
        has_share = self.split is not None and self.split[SPLIT_NAMES.index(split_name)] > 0
        return self.shared if has_share else ()

    def is_blend(self, split_name: str) -> bool:
        """Whether megatron-core blends the split's sources; it reads a single prefix of a split's own as it is."""
        sources = self.sources_of(split_name)
        return len(sources) > 1 or (self.own is None and any(source.weight is not None for source in sources))

    def bounds_of(self, split_name: str) -> tuple[float, float]:
        """Where a split lies in each source, as shares of its sequences."""
        if self.split is None:
            return 0.0, 1.0
        index = SPLIT_NAMES.index(split_name)
        return sum(self.split[:index]), sum(self.split[: index + 1])


def parse_blend(flag: str, words: list[str]) -> tuple[tuple[DataSource, ...], list[str]]:
    """Prefixes alone, or weights and prefixes in turn; anything between the two is a problem."""
    if not words or not all(word.strip() for word in words):
        return (), [f"{flag}: must name prefixes, got {words}. Pass --{flag} PREFIX."]
    numbers = [_read_number(word) for word in words]
    if all(number is None for number in numbers):
        named = tuple(DataSource(prefix=word.strip(), weight=None) for word in words)
        return named, _find_repeated(flag, named)
    # Strictly in turn: a prefix that is a number, such as 2024, would otherwise be taken for a weight in silence.
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
    return sources, _find_repeated(flag, sources) + [
        f"{flag}: weights must be positive and finite, got weight={source.weight} for {source.prefix}. "
        "Give it a weight, or leave it out."
        for source in sources
        if source.weight is None or not 0 < source.weight < math.inf
    ]


def _find_repeated(flag: str, sources: Sequence[DataSource]) -> list[str]:
    """A problem for each prefix that comes again: Megatron would draw the same samples of it in the same order."""
    return [
        f"{flag}: a data set must be named once, got {prefix} {times} times. Name it once, with a larger weight."
        for prefix, times in Counter(source.prefix for source in sources).items()
        if times > 1
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


def count_split_tokens(index: IndexSummary, bounds: tuple[float, float]) -> int:
    """Tokens of the sequences between two shares of a data set, cut where megatron-core cuts it.

    Source: BlendedMegatronDatasetBuilder._build_megatron_dataset_splits (round of share x number of sequences).
    """
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    # The header has this number; the lengths need not be read.
    if (first, last) == (0, index.num_sequences):
        return index.num_tokens
    return int(np.sum(index.sequence_lengths[first:last], dtype=np.int64))


def _read_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
