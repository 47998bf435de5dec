"""The data flags of a command line as a `DataPlan`, read strictly.

Megatron reads the same flags in megatron.training.utils.get_blend_and_blend_per_split and
megatron.core.datasets.utils.get_blend_from_list, which take any list that is not clearly weighted as prefixes alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.config.flags import flag_of
from megatron_hammer.data.sources import SPLIT_FLAGS, SPLIT_NAMES, DataPlan, parse_blend, parse_split


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFlags:
    """The flags that name data, as typed. data_paths_of: --train-data-path and its siblings, by split."""

    mock_data: bool
    data_path: Sequence[str] | None
    data_args_path: str | None
    per_split_data_args_path: str | None
    data_paths_of: dict[str, list[str] | None]
    split: str | None
    skips_training: bool

    def list_given(self) -> list[str]:
        """Those that are set."""
        values = {
            # False is the flag's default and means not given, so it is listed as None like the others.
            "--mock-data": self.mock_data or None,
            "--data-path": self.data_path,
            "--data-args-path": self.data_args_path,
            "--per-split-data-args-path": self.per_split_data_args_path,
        }
        values |= {f"--{flag_of(SPLIT_FLAGS[name])}": words for name, words in self.data_paths_of.items()}
        return [flag for flag, value in values.items() if value is not None]


def read_data_plan(flags: DataFlags) -> tuple[DataPlan, list[str]]:
    """The data flags as a plan, and what is wrong with them; the plan is empty where they contradict each other."""
    given = flags.list_given()
    # The three flags of one split each are one way of naming data; they may be combined with each other only.
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
    if flags.mock_data:
        return DataPlan(is_mock=True), []
    if flags.data_path is not None:
        return _read_shared(flags, "data-path", flags.data_path)
    if flags.data_args_path is not None:
        words, problems = _read_words("data-args-path", flags.data_args_path)
        return (DataPlan(), problems) if problems else _read_shared(flags, "data-args-path", words)
    return _read_own(flags)


def _read_shared(flags: DataFlags, flag: str, words: Sequence[str]) -> tuple[DataPlan, list[str]]:
    sources, problems = parse_blend(flag, list(words))
    split, split_problems = parse_split(flags.split)
    return DataPlan(shared=sources, split=split), problems + split_problems


def _read_own(flags: DataFlags) -> tuple[DataPlan, list[str]]:
    problems = []
    # --split cuts one data set into three parts; here each part already has its own data set.
    if flags.split is not None:
        problems.append(
            f"split: cannot be combined with a data set for each split, got split={flags.split}. Drop --split."
        )
    lists = flags.data_paths_of
    if flags.per_split_data_args_path is not None:
        lists, file_problems = _read_split_file(flags.per_split_data_args_path)
        problems += file_problems
    own = {}
    for name, words in lists.items():
        if words:
            own[name], blend_problems = parse_blend(flag_of(SPLIT_FLAGS[name]), words)
            problems += blend_problems
    # Only where nothing else is wrong: a list that could not be read is also missing here.
    if "train" not in own and not flags.skips_training and not problems:
        problems.append("train-data-path: training needs a data set, got none. Pass --train-data-path PREFIX.")
    return DataPlan(own=own), problems


def _read_words(flag: str, path: str) -> tuple[list[str], list[str]]:
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    # ValueError covers UnicodeDecodeError, such as of a .bin that was passed instead of the list.
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
    # ValueError: neither UTF-8 nor JSON; KeyError: a split is missing; TypeError: not an object, or the type above.
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [
            f"per-split-data-args-path: must be a JSON object with the keys train, valid and test, got {path} "
            f"({type(error).__name__}: {error}). Use null for a split without data."
        ]
    return {name: words.split() if isinstance(words, str) else words for name, words in lists.items()}, []
