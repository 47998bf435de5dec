"""Ranks that were not started alike are named, with what differs. Ranks are threads here."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron_hammer.data.sources import DataPlan, DataSource
from megatron_hammer.errors import ConfigError, HammerError, PlatformError
from megatron_hammer.training.cluster.agreement import describe_process, hash_code, require_agreement
from megatron_hammer.training.cluster.roll_call import RollCall
from tests.helpers.training_runs import write_toy_data

WORLD_SIZE = 4
ALIKE: dict[str, Any] = {
    "arguments": {"lr": "0.001", "save_interval": "10", "min_lr": "0.0001"},
    "versions": {"torch": "2.15"},
    "data files": {"corpus": "5 tokens, abc"},
}


def agree(described: list[dict[str, Any]], typed: tuple[str, ...] = (), timeout_s: float = 5.0) -> list[Any]:
    """What each rank raises; None for a rank that goes on."""
    store = torch.distributed.HashStore()

    def start(rank: int) -> HammerError | None:
        try:
            require_agreement(RollCall(store=store, rank=rank, world_size=WORLD_SIZE, timeout_s=timeout_s),
                              described[rank], typed)  # fmt: skip
        except HammerError as error:
            return error
        return None

    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        return list(pool.map(start, range(len(described))))


def alike_but(rank: int, subject: str, name: str, value: str | None) -> list[dict[str, Any]]:
    described = [copy.deepcopy(ALIKE) for _ in range(WORLD_SIZE)]
    described[rank][subject][name] = value
    return described


def test_equal_ranks_go_on() -> None:
    described = [copy.deepcopy(ALIKE) for _ in range(WORLD_SIZE)]
    described[1]["data files"] = None  # another rank of this host reads them
    assert agree(described) == [None] * WORLD_SIZE


@pytest.mark.parametrize(
    ("rank", "subject", "name", "value"),
    [
        (2, "arguments", "lr", "0.002"),
        (0, "arguments", "save_interval", "20"),
        (3, "versions", "torch", "2.14"),
        (1, "data files", "corpus", "4 tokens, abd"),
        (1, "data files", "corpus", "not readable"),
    ],
)
def test_the_rank_that_differs_is_named_on_all(rank: int, subject: str, name: str, value: str) -> None:
    for error in agree(alike_but(rank, subject, name, value)):
        assert isinstance(error, ConfigError)
        (problem,) = error.problems
        assert problem.startswith(f"{subject}: {name}: ")
        assert f"{ALIKE[subject][name]} on 3 ranks, but {value} on rank {rank} (" in problem


def test_what_follows_from_a_typed_argument_is_not_named() -> None:
    described = alike_but(1, "arguments", "lr", "0.002")
    described[1]["arguments"]["min_lr"] = "0.0002"
    assert [len(error.problems) for error in agree(described, typed=("lr",))] == [1] * WORLD_SIZE
    assert [len(error.problems) for error in agree(described)] == [2] * WORLD_SIZE


def test_an_argument_that_only_one_rank_has_is_named() -> None:
    problems = agree(alike_but(3, "arguments", "bf16", "true"))[0].problems
    assert "not set on 3 ranks, but true on rank 3 (" in problems[0]


def test_a_rank_that_does_not_answer_is_named() -> None:
    errors = agree([copy.deepcopy(ALIKE) for _ in range(WORLD_SIZE - 1)], timeout_s=0.3)
    assert isinstance(errors[0], PlatformError)
    assert "rank 3 (" in str(errors[0])


def test_a_process_is_described_without_what_differs_by_design(tmp_path: Any) -> None:
    prefix = write_toy_data(tmp_path / "corpus", num_documents=3)
    sources = DataPlan(own={"train": (DataSource(prefix=prefix, weight=None),)})
    arguments = {"rank": 3, "lr": 1e-3, "data_cache_path": "/scratch/3", "names": {"b", "a"}}
    described = describe_process(arguments, sources)
    assert described["arguments"] == {"lr": "0.001", "names": "\"['a', 'b']\""}
    assert described["versions"] is not None
    assert described["versions"]["code of megatron_hammer"] == hash_code()
    assert list(described["data files"] or ()) == [prefix]
