import pytest

from megatron_hammer.config.environment import (
    DEFAULTS,
    ProcessPlace,
    read_first_host,
    read_process_place,
    read_slurm_variables,
)
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


SLURM_TASK = {
    "SLURM_JOB_ID": "4500123",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "n[07-08],m1",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def test_a_task_of_srun_is_numbered_as_torchrun_would() -> None:
    assert read_slurm_variables(SLURM_TASK) == {
        "RANK": "17",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": "10123",
    }
    own = {"MASTER_ADDR": "fabric", "MASTER_PORT": "7"}
    assert own.items() <= read_slurm_variables(SLURM_TASK | own).items()


def test_a_task_with_a_gpu_of_its_own_uses_the_one_that_it_sees() -> None:
    place = read_slurm_variables(SLURM_TASK | {"CUDA_VISIBLE_DEVICES": "1"})
    assert (place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"], place["RANK"]) == ("0", "1", "17")
    assert read_slurm_variables(SLURM_TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # in sbatch, outside srun
        SLURM_TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM_TASK | {"RANK": "0"},  # torchrun, started by srun
    ],
)
def test_a_process_that_srun_did_not_number_stays_as_it_is(environment: dict[str, str]) -> None:
    assert read_slurm_variables(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[1-4]", "n1"), ("a-b[03,7]c,d", "a-b03c"), ("rack[2-3]n[07,09]", "rack2n07"), ("m,n[1-2]", "m")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert read_first_host(nodes) == host
