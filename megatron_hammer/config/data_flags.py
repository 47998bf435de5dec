"""The data flags of a command line as a `DataPlan`, read strictly.

Megatron reads the same flags in megatron.training.utils.get_blend_and_blend_per_split and
megatron.core.datasets.utils.get_blend_from_list, which take any list that is not clearly weighted as prefixes alone.
"""

import argparse
import json
from pathlib import Path

from megatron_hammer.data.sources import SPLIT_FLAGS, SPLIT_NAMES, DataPlan, parse_blend, parse_split


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
