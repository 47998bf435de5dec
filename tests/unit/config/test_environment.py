import pytest

from megatron_hammer.config.environment import DEFAULTS, ProcessPlace, read_process_place
from megatron_hammer.errors import ConfigError
from tests.helpers.parsed_flags import TINY, find, parse


def set_only(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_rank_and_world_size_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch)
    assert read_process_place() == (0, 1, 0, 1)
    set_only(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert read_process_place() == ProcessPlace(rank=5, world_size=8, local_rank=1, local_world_size=4)


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: must be a whole number of at least 1, got WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": ""}, "got WORLD_SIZE=''"),
        ({"WORLD_SIZE": "0"}, "got WORLD_SIZE='0'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: must be a whole number of at least 0, got LOCAL_RANK='x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "got LOCAL_WORLD_SIZE='0'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: must be a whole number of at least 0, got RANK='-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: must be below WORLD_SIZE, got RANK=2, WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK: must be below WORLD_SIZE, got RANK=1, WORLD_SIZE=1"),
    ],
)
def test_impossible_ranks_and_world_sizes_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], match: str
) -> None:
    set_only(monkeypatch, **variables)
    with pytest.raises(ConfigError) as error:
        parse(*TINY)
    (problem,) = error.value.problems
    assert match in problem


def test_samples_replace_the_warm_up_of_the_preset() -> None:
    assert find(*TINY, "--train-samples", "1600", "--lr-warmup-samples", "8") == []


def test_a_fraction_replaces_the_warm_up_of_the_preset() -> None:
    assert find(*TINY, "--lr-warmup-fraction", "0.1") == []
    assert find(*TINY, "--lr-warmup-fraction", "0.1", "--train-samples", "1600") == []
