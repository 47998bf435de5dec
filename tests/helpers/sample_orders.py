"""Megatron's own data sets of a run, built in this process, and the tokens that they draw."""

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from megatron_hammer.data.indexed.pair import IndexedWriter
from tests.helpers.indexed_writing import add_document
from tests.helpers.parsed_flags import install


class StubTokenizer:
    """As much of a tokenizer as a data set asks for."""

    vocab_size = 1 << 20
    pad, eod, eos = -1, 0, 0
    unique_identifiers: ClassVar = {"class": "StubTokenizer"}
    special_tokens_dict: ClassVar = {}


def write_numbered(prefix: Path, lengths: list[int]) -> str:
    """Documents of these lengths whose tokens count up through the file: a token tells where it stands."""
    next_id = 0
    with IndexedWriter(prefix, np.dtype(np.int32)) as writer:
        for length in lengths:
            add_document(writer, np.arange(next_id, next_id + length, dtype=np.int32))
            next_id += length
    return str(prefix)


def draw_lengths(seed: int, num_documents: int, *, longest: int = 90) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, num_documents).tolist()


def build_datasets(arguments: Any, num_samples: tuple[int, int, int] | None = None) -> list[Any]:
    """(train, valid, test) as the run would build them; without --data-cache-path nothing is left on disk."""
    install()
    from megatron import training

    from megatron_hammer.config.arguments import build_dataset_config
    from megatron_hammer.config.datasets import select_samples
    from megatron_hammer.config.training_state import TrainingState
    from megatron_hammer.data.provider import DatasetProvider

    needed, namespace = arguments.plan.num_samples, arguments.namespace
    with tempfile.TemporaryDirectory() as cache_dir:
        cache = {"data_cache_path": namespace.data_cache_path or cache_dir, "data_parallel_size": 1}
        arguments = dataclasses.replace(arguments, namespace=argparse.Namespace(**vars(namespace) | cache))
        with mock.patch.object(training, "get_tokenizer", StubTokenizer):
            config = build_dataset_config(arguments, arguments.plan)
        provider = DatasetProvider(
            config,
            lambda vp_stage: True,
            select_samples=functools.partial(select_samples, arguments.plan, TrainingState(namespace)),
        )
        return provider(num_samples or (needed["train"], needed["valid"], needed["test"]))


def read_tokens(dataset: Any, first: int, last: int) -> np.ndarray:
    """The input tokens of samples [first, last), with the source in front: [n, 2]."""
    rows = []
    for position in range(first, last):
        sample = dataset[position]
        tokens = sample["tokens"].numpy()
        rows.append(np.stack([np.full(len(tokens), int(sample.get("dataset_id", 0))), tokens], axis=1))
    return np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.int64)
