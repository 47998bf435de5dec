"""The environment variables by which torchrun and SLURM launchers number a process, read strictly. Pure."""

import os
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
