"""GPUs and clusters: read from `gpus.toml` and `clusters.toml`, and from a user's files that change or extend them.

The two files say what their fields mean, and `plan.py` has the types. Nothing here computes a time.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml, validate
from megatron_hammer.scaling.plan import Cluster, Gpu

DATA_DIR = Path(__file__).resolve().parent
SHIPPED_GPUS_PATH = DATA_DIR / "gpus.toml"
SHIPPED_CLUSTERS_PATH = DATA_DIR / "clusters.toml"


def load_gpus(path: Path | None = None) -> dict[str, Gpu]:
    """Every known GPU by name: the shipped ones, changed and extended by the TOML file `path`.

    Raises ConfigError naming every bad table and field of the file at once.
    """
    return dict(_load_shipped_gpus()) if path is None else _load_gpus((SHIPPED_GPUS_PATH, path))


def load_clusters(path: Path | None = None, *, gpus_path: Path | None = None) -> dict[str, Cluster]:
    """Every known cluster by name: the shipped ones, changed and extended by `path`.

    Each cluster names a GPU of load_gpus(gpus_path).

    Raises ConfigError naming every bad table and field of the file at once.
    """
    if path is None:
        return dict(_load_shipped_clusters())
    clusters = _build_tables(Cluster, dict[str, Cluster], (SHIPPED_CLUSTERS_PATH, path))
    gpu_names = load_gpus(gpus_path)
    _raise_problems(
        [
            f"{path}: [{cluster.name}] gpu: must be a known GPU, got gpu={cluster.gpu!r}. "
            f"Use one of {', '.join(gpu_names)}, or describe it in a file for --gpus-file."
            for cluster in clusters.values()
            if cluster.gpu not in gpu_names
        ]
    )
    return clusters


def select_gpu(name: str, path: Path | None = None) -> Gpu:
    """The GPU with this name or alias; case, spaces and hyphens do not matter. Otherwise, the one that its parts name.

    Raises ConfigError with the known names.
    """
    gpus = load_gpus(path)
    wanted = normalise_name(name)
    for gpu in gpus.values():
        if wanted in _normalised_names(gpu):
            return gpu
    named = _find_gpu_by_parts(name, list(gpus.values()))
    if named is not None:
        return named
    raise ConfigError(
        f"gpu: must be a known GPU, got gpu={name!r}. "
        f"Use one of {', '.join(gpus)}, or describe it in a file for --gpus-file."
    )


def select_cluster(name: str, path: Path | None = None, *, gpus_path: Path | None = None) -> Cluster:
    """The cluster of this name. Raises ConfigError with the known names."""
    clusters = load_clusters(path, gpus_path=gpus_path)
    if name not in clusters:
        raise ConfigError(
            f"cluster: must be a known cluster, got cluster={name!r}. "
            f"Use one of {', '.join(clusters)}, or describe it in a file for --clusters-file."
        )
    return clusters[name]


def select_default_cluster(gpu_name: str, path: Path | None = None, *, gpus_path: Path | None = None) -> Cluster:
    """The first cluster that is built from this GPU (its name, not an alias). Clusters that `path` adds come first.

    Raises ConfigError if there is none.
    """
    clusters = load_clusters(path, gpus_path=gpus_path).values()
    shipped = _load_shipped_clusters()
    for cluster in sorted(clusters, key=lambda cluster: cluster.name in shipped):
        if cluster.gpu == gpu_name:
            return cluster
    raise ConfigError(
        f"cluster: must be given for a GPU that no known cluster is built of, got gpu={gpu_name!r}. "
        "Describe one in a file for --clusters-file."
    )


def find_gpu_by_device_name(device_name: str) -> Gpu | None:
    """The GPU that torch.cuda.get_device_name() names in full, by its name or an alias; None for every other device.

    A part of the name is not enough. "NVIDIA H200 NVL" and "NVIDIA A100-SXM4-40GB MIG 3g.20gb" contain the name of
    another GPU, whose peak would give a wrong MFU.
    """
    wanted = normalise_name(device_name)
    return next((gpu for gpu in _load_shipped_gpus().values() if wanted in _normalised_names(gpu)), None)


def _normalised_names(gpu: Gpu) -> set[str]:
    return {normalise_name(spelling) for spelling in (gpu.name, *gpu.aliases)}


def _find_gpu_by_parts(name: str, gpus: list[Gpu]) -> Gpu | None:
    """The GPU with this chip, form factor and memory, in any order: 'DGX A100 SXM4 (40 GB)' -> a100-sxm-40gb."""
    text = name.lower()
    chip = re.search(r"(?<![a-z0-9])(gb[23]00|[abhlv]\d{2,3}s?)(?![a-z0-9])", text)
    if chip is None or re.search(r"\bmig\b", text):  # a MIG device is a slice of the GPU that it names
        return None
    # NVLink and NVL72 name the connection, not the form factor NVL.
    form = "pcie" if "pcie" in text or "pci-e" in text else "nvl" if re.search(r"nvl(?!ink|\d)", text) else None
    gigabytes = re.search(r"(\d{2,3}) ?g(?:i?b)?(?![a-z0-9])", text)
    found = []
    for gpu in gpus:
        parts = gpu.name.split("-")
        own_form = next((part for part in ("pcie", "nvl") if part in parts), None)
        # Names give GB or GiB without saying which; these differ by 7 %.
        has_memory = gigabytes is None or abs(gpu.memory_bytes / (int(gigabytes.group(1)) * 1e9) - 1) < 0.12
        if parts[0] == chip.group(1) and own_form == form and has_memory:
            found.append(gpu)
    # If several remain because no memory is named, prefer the variant whose alias is the chip's name alone.
    return min(found, key=lambda gpu: chip.group(1) not in map(normalise_name, gpu.aliases), default=None)


def normalise_name(name: str) -> str:
    """A name in canonical form, lower case, no vendor, no punctuation: 'NVIDIA A100-SXM4-80GB' -> 'a100sxm480gb'."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia|tesla|geforce)+", "", letters)


@functools.cache
def _load_shipped_gpus() -> Mapping[str, Gpu]:
    return _load_gpus((SHIPPED_GPUS_PATH,))


@functools.cache
def _load_shipped_clusters() -> Mapping[str, Cluster]:
    return _build_tables(Cluster, dict[str, Cluster], (SHIPPED_CLUSTERS_PATH,))


def _load_gpus(paths: tuple[Path, ...]) -> dict[str, Gpu]:
    gpus = _build_tables(Gpu, dict[str, Gpu], paths)
    _raise_problems(_find_alias_problems(gpus.values(), paths[-1]))
    return gpus


def _build_tables[T](kind: type[T], table_kind: type[dict[str, T]], paths: tuple[Path, ...]) -> dict[str, T]:
    """What the tables of all files describe, by name. Fields of a later file replace those of an earlier one."""
    merged: dict[str, dict[str, Any]] = {}
    known = ", ".join(field.name for field in fields(kind) if field.name != "name")  # type: ignore[arg-type]
    remedy = f"Write [name] tables with the fields {known}."
    for path in paths:
        for name, table in read_toml(path, dict[str, dict[str, Any]], remedy=remedy, raises=ConfigError).items():
            if "name" in table:
                raise ConfigError(f"{path}: {name}.name must be left out, got {table['name']!r}. Rename the table.")
            merged[name] = merged.get(name, {"name": name}) | table
    return validate(merged, table_kind, where=str(paths[-1]), remedy=remedy, raises=ConfigError, allows_unknown=False)


def _find_alias_problems(gpus: Iterable[Gpu], path: Path) -> list[str]:
    owners: dict[str, str] = {}
    problems = []
    for gpu in gpus:
        for alias in {normalise_name(spelling): spelling for spelling in (gpu.name, *gpu.aliases)}.items():
            owner = owners.setdefault(alias[0], gpu.name)
            if owner != gpu.name:
                problems.append(
                    f"{path}: [{gpu.name}] aliases: must mean one GPU, got {alias[1]!r}, which also means {owner}. "
                    "Drop it from one of the two."
                )
    return problems


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ConfigError(*problems)
