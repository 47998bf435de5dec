"""Whether cached sample indices are those of the data that they would be used for.

megatron-core finds a cache by prefix, seed, split and number of samples, and not by what the files hold: after a corpus
is preprocessed again under its old prefix, the old indices would cut the new documents in the wrong places.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.data.sources import SPLIT_NAMES, DataPlan


def find_cache_problems(cache_dir: str | None, sources: DataPlan, indices: dict[str, IndexSummary]) -> list[str]:
    """Caches that are older than the .idx they were made from, and do not agree with it."""
    prefixes = dict.fromkeys(source.prefix for name in SPLIT_NAMES for source in sources.sources_of(name))
    stale: dict[tuple[str, Path], None] = {}
    for prefix in prefixes:
        written_at_ns = Path(f"{prefix}.idx").stat().st_mtime_ns
        # Age first: reading the indices of a large corpus takes time, and a newer cache was made from this .idx.
        for path, description in list_descriptions(cache_dir, prefix):
            is_older = path.stat().st_mtime_ns < written_at_ns
            if is_older and not is_index_of(path, description, indices[prefix]):
                stale[prefix, path.parent] = None
    return [
        f"data-cache-path: sample indices must be those of the data, got others for {prefix} in {directory}, older "
        f"than its .idx. Delete the files in {directory}; they are built again."
        for prefix, directory in stale
    ]


def list_descriptions(data_cache_path: str | None, prefix: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, contents) of every cached index of this prefix, of any run."""
    folder = Path(data_cache_path) if data_cache_path is not None else Path(prefix, "cache")
    for path in sorted(folder.glob("*-description.txt" if data_cache_path is not None else "*/*-description.txt")):
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            if description.get("dataset_path") == prefix:
                yield path, description
        except (OSError, ValueError, AttributeError):
            continue  # not one of megatron-core's, or being written


def is_index_of(path: Path, description: dict[str, Any], index: IndexSummary) -> bool:
    """Whether the samples begin every sequence_length tokens of the split's documents. True where a file is missing.

    A missing file makes megatron-core build all of them again.
    """
    try:
        documents, samples = (
            np.load(path.with_name(path.name.replace("description.txt", f"{name}.npy")), mmap_mode="r")
            for name in ("document_index", "sample_index")
        )
    except (OSError, ValueError):
        return True
    matrix, split = description.get("split_matrix"), description["index_split"]
    bounds = matrix[SPLIT_NAMES.index(split)] if matrix else (0.0, 1.0)
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    # Other documents than the split's: the corpus had another number of them.
    if len(documents) == 0 or (int(documents.min()), int(documents.max())) != (first, last - 1):
        return False
    stream = np.concatenate([[0], np.cumsum(index.sequence_lengths[documents], dtype=np.int64)])
    starts = stream[samples[:, 0]] + samples[:, 1]
    seq_length = description["sequence_length"]
    # A sample's labels reach one token beyond it, so the last token of the stream begins no sample.
    num_samples = (int(stream[-1]) - 1) // seq_length
    return len(samples) == num_samples + 1 and np.array_equal(starts, np.arange(num_samples + 1) * seq_length)
