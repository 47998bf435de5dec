"""Whether all ranks of a run were started alike, asked before its process groups form.

A rank with another learning rate trains on in silence; one with another layout, interval or version hangs or fails in a
collective, far from the cause. The ranks compare hashes through the store of the process group, which needs no
collective, and only ranks with different hashes send what lies behind them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import megatron_hammer
from megatron_hammer.config.flags import Flags
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.data.sources import DataPlan
from megatron_hammer.errors import ConfigError, PlatformError
from megatron_hammer.training.cluster.findings import compare_values
from megatron_hammer.training.cluster.rank_groups import name_hosts
from megatron_hammer.training.cluster.roll_call import MissingRanksError, RollCall, read_place
from megatron_hammer.training.cluster.software import identify_data, read_versions

# Which process this is, and folders that may lie on a host's own disk.
_OF_ONE_PROCESS = frozenset(("rank", "local_rank", "data_cache_path", "non_persistent_local_ckpt_dir"))
_REMEDIES = {
    "arguments": "Start every rank with the same command line and environment.",
    "versions": "Install the same on every host.",
    "data files": "Copy the files again, or read them from one file system.",
}


def require_equal_ranks(plan: RunPlan, flags: Flags) -> None:
    """Compare the ranks of the process group that has just formed; raises as `require_agreement` does."""
    machine = plan.machine
    if machine.world_size == 1 or torch.distributed.get_backend() == "fake":
        return
    roll = RollCall(
        store=torch.distributed.distributed_c10d._get_default_store(),
        rank=machine.rank,
        world_size=machine.world_size,
        timeout_s=60.0 * flags.values["distributed_timeout_minutes"],
    )
    # One rank of a host reads the data files for all.
    described = describe_process(flags.values, plan.data.sources if machine.local_rank == 0 else None)
    require_agreement(roll, described, sorted(flags.typed))


def describe_process(arguments: Mapping[str, Any], sources: DataPlan | None) -> dict[str, dict[str, str] | None]:
    """What must be equal on all ranks, as text: arguments, versions, and data files.

    arguments: Megatron's. sources: None where another rank of this host identifies the files.
    """
    return {
        "arguments": {
            name: json.dumps(value, sort_keys=True, default=_describe_value)
            for name, value in sorted(arguments.items())
            if name not in _OF_ONE_PROCESS
        },
        "versions": {
            **{name: version or "not installed" for name, version in read_versions(None).items()},
            "code of megatron_hammer": hash_code(),
        },
        "data files": None if sources is None else identify_data(sources),
    }


def hash_code() -> str:
    """SHA-256 of the package's source files, the first digits: two clones of one version may differ."""
    root = Path(megatron_hammer.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def require_agreement(roll: RollCall, described: Mapping[str, Mapping[str, str] | None], typed: Sequence[str]) -> None:
    """Raise ConfigError on every rank if the ranks were not started alike; every rank must call it.

    described: of this rank, by subject (describe_process). typed: arguments of this rank's command line; they are
    named, and not those that follow from them. Raises PlatformError with the ranks that do not answer in time.
    """
    try:
        _compare(roll, described, typed)
    except MissingRanksError as error:
        raise PlatformError(f"start of the ranks: {error}. See the logs of these ranks, and their hosts.") from error


def _compare(roll: RollCall, described: Mapping[str, Mapping[str, str] | None], typed: Sequence[str]) -> None:
    hashes = {subject: _hash(values) for subject, values in described.items() if values is not None}
    answers = roll.gather("agreement", [read_place(), hashes])
    witnesses: list[int] = []
    if answers is not None:
        roll.hosts.update(enumerate(name_hosts([place for place, _ in answers])))
        witnesses = _find_witnesses([hashes for _, hashes in answers])
    witnesses = roll.share("agreement witnesses", witnesses)
    if not witnesses:
        return
    told = roll.gather("agreement values", [described, list(typed)] if roll.rank in witnesses else None)
    problems: list[str] = []
    if answers is not None and told is not None:
        problems = _describe_differences(roll, [hashes for _, hashes in answers], [told[rank] for rank in witnesses])
    raise ConfigError(*roll.share("agreement problems", problems))


def _find_witnesses(hashes: Sequence[Mapping[str, str]]) -> list[int]:
    """The first rank with each value of a subject in which ranks differ. hashes: by rank."""
    first_ranks: dict[str, dict[str, int]] = {}
    for rank, of_rank in enumerate(hashes):
        for subject, value in of_rank.items():
            first_ranks.setdefault(subject, {}).setdefault(value, rank)
    return sorted({rank for ranks in first_ranks.values() if len(ranks) > 1 for rank in ranks.values()})


def _describe_differences(roll: RollCall, hashes: Sequence[Mapping[str, str]], told: Sequence[Any]) -> list[str]:
    """A sentence for each difference. hashes: by rank. told: what the witnesses described, and typed."""
    typed = {name for _, names in told for name in names}
    problems = []
    for subject, remedy in _REMEDIES.items():
        values_of = {_hash(described[subject]): described[subject] for described, _ in told if described[subject]}
        names = sorted({name for values in values_of.values() for name in values})
        different = [name for name in names if len({values.get(name) for values in values_of.values()}) > 1]
        if subject == "arguments":
            different = [name for name in different if name in typed] or different
        for name in different:
            values = {
                roll.name_ranks([rank]): values_of[of_rank[subject]].get(name)
                for rank, of_rank in enumerate(hashes)
                if subject in of_rank
            }
            problems.append(f"{subject}: {name}: {compare_values(name, values, remedy=remedy, of='ranks').text}")
    return problems


def _hash(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _describe_value(value: Any) -> str:
    return str(sorted(map(str, value))) if isinstance(value, set | frozenset) else str(value)
