"""Whether cached sample indices are those that the run would build.

megatron-core finds a cache by prefix, seed, split and number of samples, and trusts what it finds. But a corpus may
have been preprocessed again under its old prefix, with its old times too (`rsync -a`), and a cache file may be cut
short or damaged. The content of a cache follows from the lengths of the sequences and from its description, so it is
computed again and compared.
"""

import hashlib
import itertools
import json
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.config.preflight.paths import find_unwritable
from megatron_hammer.config.run_plan import Data
from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.data.order.order import EPOCHWISE, MEGATRON, build_blend, build_source_order, plan_epochs
from megatron_hammer.data.sources import SPLIT_NAMES

CLASS_NAMES = {"GPTDataset": MEGATRON, "EpochwiseGPTDataset": EPOCHWISE}
SOURCE_PARTS = ("document_index", "sample_index", "shuffle_index")
BLEND_PARTS = ("dataset_index", "dataset_sample_index")
ROWS_AT_ONCE = 1 << 20


_CACHE_NAME = re.compile(r"[0-9a-f]{32}-")


def find_cache_problems(
    data: Data, indices: dict[str, IndexSummary], seq_length: int, *, is_needed: bool = False
) -> list[str]:
    """Caches that the run may use and that are not what it would build, and folders that cannot take a missing one.

    is_needed: megatron-core is told to build none (--dataloader-fast-cache-load).
    """
    problems: dict[str, None] = {}
    prefixes = dict.fromkeys(source.prefix for name in SPLIT_NAMES for source in data.sources.sources_of(name))
    found: dict[str, bool] = dict.fromkeys(prefixes, False)
    folders = [Path(data.cache_dir)] if data.cache_dir is not None else [Path(prefix, "cache") for prefix in prefixes]
    for path, description in itertools.chain.from_iterable(map(list_descriptions, folders)):
        if not _is_named_by_content(path):
            problems[
                f"data-cache-path: a description must be as megatron-core wrote it, got {path}, which is damaged. "
                f"Delete it and {path.name.removesuffix('description.txt')}* beside it; they are built again."
            ] = None
            continue
        sources = description.get("datasets", [description])
        # Caches of other runs are read by those alone.
        if not all(_is_of_run(source, data, seq_length, prefixes) for source in sources):
            continue
        if not all(part.is_file() for part in _list_parts(path, description)):
            continue  # then megatron-core builds all of them again
        found |= {source["dataset_path"]: True for source in sources}
        if not is_intact(path, description, indices):
            base = path.name.removesuffix("description.txt")
            names = ", ".join(dict.fromkeys(source["dataset_path"] for source in sources))
            problems[
                f"data-cache-path: sample indices must be those of the data, got others for {names} in "
                f"{path.parent}/{base}*. Delete these files; they are built again."
            ] = None
    if data.cache_dir is not None:
        problems |= dict.fromkeys(
            f"dataloader-fast-cache-load: reads sample indices and builds none, got none for {prefix} in "
            f"{data.cache_dir}. Build them with tools/build_data_cache.py, or drop the flag."
            for prefix in prefixes
            if is_needed and not found[prefix]
        )
        return list(problems)
    for prefix in prefixes:
        # Without --data-cache-path, the indices are written beside the data, which may lie on a read-only disk.
        if not found[prefix] and find_unwritable("data_cache_path", f"{prefix}/cache"):
            problems[
                f"data-cache-path: must be given where nothing can be written beside the data, got none, and {prefix} "
                "lies in such a folder. Pass --data-cache-path FOLDER."
            ] = None
    return list(problems)


def list_descriptions(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, contents) of every cached index in the folder, or in its folders, of any run."""
    for path in sorted({*folder.glob("*-description.txt"), *folder.glob("*/*-description.txt")}):
        if not _CACHE_NAME.match(path.name):
            continue
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not one of megatron-core's, or being written
        if isinstance(description, dict):
            yield path, description


def _is_of_run(source: Any, data: Data, seq_length: int, prefixes: dict[str, None]) -> bool:
    return isinstance(source, dict) and (
        source.get("dataset_path") in prefixes
        and CLASS_NAMES.get(source.get("class", "")) == data.order
        and (source.get("random_seed"), source.get("sequence_length")) == (data.seed, seq_length)
    )


def _is_named_by_content(path: Path) -> bool:
    """megatron-core names all files of a cache by the hash of its description (GPTDataset.__init__)."""
    return path.name.startswith(hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())


def _list_parts(path: Path, description: dict[str, Any]) -> list[Path]:
    names = BLEND_PARTS if "datasets" in description else SOURCE_PARTS
    return [path.with_name(path.name.replace("description.txt", f"{name}.npy")) for name in names]


def is_intact(path: Path, description: dict[str, Any], indices: dict[str, IndexSummary]) -> bool:
    """Whether the cache, all files of which are there, holds what would be built now."""
    try:
        arrays = [np.load(part, mmap_mode="r") for part in _list_parts(path, description)]
    # Cut short, or no numpy file; of a damaged header, which is Python, numpy says that it cannot be parsed or held.
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError):
        return False
    if "datasets" in description:
        return _is_blend(arrays, description)
    return _is_index_of(arrays, description, indices[description["dataset_path"]])


def _is_blend(arrays: Sequence[np.ndarray], description: dict[str, Any]) -> bool:
    if description.get("size") is None:
        from megatron.core.datasets import helpers

        sizes = description["weights"]  # whole numbers: each source is read once
        expected = np.zeros(sum(sizes), dtype=np.int16), np.zeros(sum(sizes), dtype=np.int64)
        helpers.build_exhaustive_blending_indices(*expected, np.array(sizes, dtype=np.int64), len(sizes))
    else:
        expected = build_blend(description["weights"], description["size"])
    return all(np.array_equal(array, part) for array, part in zip(arrays, expected, strict=True))


def _is_index_of(arrays: Sequence[np.ndarray], description: dict[str, Any], index: IndexSummary) -> bool:
    documents, samples, shuffle = arrays
    matrix, split, seq_length = (
        description.get("split_matrix"),
        description["index_split"],
        description["sequence_length"],
    )
    bounds = matrix[SPLIT_NAMES.index(split)] if matrix else (0.0, 1.0)
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    epoch_tokens = int(index.sequence_lengths[first:last].sum(dtype=np.int64))
    if epoch_tokens == 0:
        return False
    joint_samples = description.get("joint_samples", {}).get(description["dataset_path"])
    plan = plan_epochs(
        description.get("num_samples"),
        epoch_tokens,
        seq_length,
        order=CLASS_NAMES[description["class"]],
        joint_samples=joint_samples if split == "train" else None,
    )
    # The cheap comparisons first: other lengths of the sequences nearly always give another number of entries.
    num_samples = (plan.num_epochs * epoch_tokens - 1) // seq_length
    if (documents.shape, shuffle.shape) != ((plan.num_epochs * (last - first),), (num_samples,)):
        return False
    expected = build_source_order(
        np.arange(first, last, dtype=np.int32), plan, epoch_tokens, seq_length, seed=description["random_seed"]
    )
    return (
        samples.shape == (num_samples + 1, 2)
        and all(np.array_equal(array, part) for array, part in zip((documents, shuffle), expected, strict=True))
        and begins_every(seq_length, samples, documents, index.sequence_lengths)
    )


def begins_every(seq_length: int, samples: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether sample k begins at token k * seq_length of the documents read one after another.

    samples: [n + 1, 2], place in `documents` and offset in that document. documents: [d], places in `lengths`.
    """
    begin_tokens, first = 0, 0  # tokens before document `first`
    for start in range(0, len(samples), ROWS_AT_ONCE):
        places, offsets = np.asarray(samples[start : start + ROWS_AT_ONCE], dtype=np.int64).T
        # In order and within the documents, or the sums below would be of something else.
        if places[0] < first or places[-1] >= len(documents) or (np.diff(places) < 0).any() or (offsets < 0).any():
            return False
        used = lengths[documents[first : places[-1] + 1]].astype(np.int64)
        ends = begin_tokens + np.cumsum(used)
        starts = (ends - used)[places - first] + offsets
        if not np.array_equal(starts, np.arange(start, start + len(places)) * seq_length):
            return False
        if (offsets > used[places - first]).any():
            return False
        begin_tokens, first = int(ends[-1] - used[-1]), int(places[-1])
    return True
