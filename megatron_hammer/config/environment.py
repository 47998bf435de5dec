"""The environment variables by which torchrun and SLURM launchers number a process, read strictly. Pure."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from megatron_hammer.errors import ConfigError

# Of a process that no launcher started; each is also the least that the variable can be.
DEFAULTS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
REMEDY = "Unset it to run one process, or start the processes with torchrun, which sets it"


class ProcessPlace(NamedTuple):
    """Where this process stands among those of the run and of its node; a process alone is 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_process_place() -> ProcessPlace:
    """Read the place from the environment; raises ConfigError with every variable that is not a possible number.

    A rank outside its world would wait for the others until the rendezvous times out.
    """
    problems, numbers = [], dict(DEFAULTS)
    for name, least in DEFAULTS.items():
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.strip().isdecimal() or int(text) < least:
            problems.append(f"{name}: must be a whole number of at least {least}, got {name}={text!r}. {REMEDY}.")
        else:
            numbers[name] = int(text)
    if not problems and numbers["RANK"] >= numbers["WORLD_SIZE"]:
        problems.append(
            f"RANK: must be below WORLD_SIZE, got RANK={numbers['RANK']}, WORLD_SIZE={numbers['WORLD_SIZE']}. {REMEDY}."
        )
    if problems:
        raise ConfigError(*problems)
    return ProcessPlace(*numbers.values())


def read_slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, for a process that srun started as one of several; {} for every other process.

    Without these, each of the processes would train alone as rank 0, all of them into the same checkpoint.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    tasks_of_nodes = [
        int(tasks)
        for tasks, num_nodes in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]
        )  # "8(x2),4"
        for _ in range(int(num_nodes or 1))
    ]
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_of_nodes[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": read_first_host(environment["SLURM_STEP_NODELIST"]),
        # A port of its own for each job, below 32768, where Linux begins to give out ports itself.
        "MASTER_PORT": str(10_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }
    if re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")):
        # With --gpus-per-task SLURM shows each process one GPU, its own.
        found |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {name: environment.get(name, value) for name, value in found.items()}


def read_first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: 'rack[2-3]n[07,09]' begins with rack2n07."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]
