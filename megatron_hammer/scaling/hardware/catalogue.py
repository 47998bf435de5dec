"""GPUs and clusters, read from `gpus.toml` and `clusters.toml` and from files that a user lays over them.

The two files say what their fields mean. Nothing here computes a time; `plan.py` has the types.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.plan import Cluster, Gpu

DATA_DIR = Path(__file__).resolve().parent
SHIPPED_GPUS_PATH = DATA_DIR / "gpus.toml"
SHIPPED_CLUSTERS_PATH = DATA_DIR / "clusters.toml"

Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What one field of a table may hold. minimum: of a number; a number must exceed 0 where it is None."""

    kind: str  # "text", "texts", "number", "count"
    minimum: float | None = None

    def find_fault(self, value: Any) -> str | None:
        """What the value must be, or None where it is that."""
        if self.kind == "text":
            return None if isinstance(value, str) and value.strip() else "a text that is not empty"
        if self.kind == "texts":
            is_list = isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
            return None if is_list else "a list of texts"
        is_number = isinstance(value, int) or (self.kind == "number" and isinstance(value, float))
        name = "a whole number" if self.kind == "count" else "a number"
        bound = "above 0" if self.minimum is None else f"of at least {self.minimum:g}"
        is_large = is_number and (value > 0 if self.minimum is None else value >= self.minimum)
        is_good = is_large and not isinstance(value, bool) and value != float("inf")
        return None if is_good else f"{name} {bound}"


_NUMBER = FieldRule("number")
GPU_RULES: Mapping[str, FieldRule] = {
    "source": FieldRule("text"),
    "aliases": FieldRule("texts"),
    "fp32_tflops": _NUMBER,
    "fp16_tflops": _NUMBER,
    "bf16_tflops": _NUMBER,
    "fp8_tflops": _NUMBER,
    "fp4_tflops": _NUMBER,
    "memory_bytes": FieldRule("count"),
    "memory_bytes_per_s": _NUMBER,
    "power_w": _NUMBER,
}
CLUSTER_RULES: Mapping[str, FieldRule] = {
    "source": FieldRule("text"),
    "gpu": FieldRule("text"),
    "gpus_per_node": FieldRule("count"),
    "nvlink_domain_size": FieldRule("count"),
    "nvlink_bytes_per_s": _NUMBER,
    "nvlink_latency_s": FieldRule("number", 0),
    "network_bytes_per_s": _NUMBER,
    "network_latency_s": FieldRule("number", 0),
    "leaf_size": FieldRule("count", 0),
    "spine_oversubscription_ratio": FieldRule("number", 1),
    "cpu_power_w_per_node": FieldRule("number", 0),
    "power_usage_effectiveness": FieldRule("number", 1),
    "usd_per_gpu_hour": FieldRule("number", 0),
    "full_speed_processes_per_node": FieldRule("count"),
}
# A format that a GPU may lack is left out of its table, and is None in its Gpu.
OPTIONAL_FIELDS = frozenset({"bf16_tflops", "fp8_tflops", "fp4_tflops"})


def load_gpus(path: Path | None = None) -> dict[str, Gpu]:
    """Every known GPU by name: the shipped ones, and those of the TOML file `path` laid over them.

    Raises ConfigError naming every bad table and field of the file at once.
    """
    return dict(_load_shipped_gpus()) if path is None else _load_gpus((SHIPPED_GPUS_PATH, path))


def load_clusters(path: Path | None = None, *, gpus_path: Path | None = None) -> dict[str, Cluster]:
    """Every known cluster by name, those of `path` over the shipped ones; each names a GPU of load_gpus(gpus_path).

    Raises ConfigError naming every bad table and field of the file at once.
    """
    if path is None:
        return dict(_load_shipped_clusters())
    tables = _merge_tables((SHIPPED_CLUSTERS_PATH, path))
    problems = _find_table_problems(tables, CLUSTER_RULES, _required_fields(Cluster), path)
    gpu_names = load_gpus(gpus_path)
    for name, table in tables.items():
        gpu = table.get("gpu")
        if isinstance(gpu, str) and gpu not in gpu_names:
            problems.append(
                f"{path}: [{name}] gpu: must be a known GPU, got gpu={gpu!r}. "
                f"Use one of {', '.join(gpu_names)}, or describe it in a file for --gpus-file."
            )
    _raise_problems(problems)
    return {name: Cluster(name=name, **table) for name, table in tables.items()}


def select_gpu(name: str, path: Path | None = None) -> Gpu:
    """The GPU of this name or alias, capitals, spaces and hyphens aside, else the one that its parts name.

    Raises ConfigError with the known names.
    """
    gpus = load_gpus(path)
    wanted = normalise_name(name)
    for gpu in gpus.values():
        if wanted in {normalise_name(spelling) for spelling in (gpu.name, *gpu.aliases)}:
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
    """The first cluster that is built of this GPU (its name, not an alias): one that `path` adds before a shipped one.

    Raises ConfigError where there is none.
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
    """The GPU that torch.cuda.get_device_name() means, by the longest alias within it; None for any other device."""
    found = [
        (len(alias), gpu)
        for gpu in _load_shipped_gpus().values()
        for alias in gpu.aliases
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(alias)}(?![A-Za-z0-9])", device_name, re.IGNORECASE)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _find_gpu_by_parts(name: str, gpus: list[Gpu]) -> Gpu | None:
    """The GPU of a chip, a form and a memory in any order: 'DGX A100 SXM4 (40 GB)' -> a100-sxm-40gb."""
    text = name.lower()
    chip = re.search(r"(?<![a-z0-9])(gb[23]00|[abhlv]\d{2,3}s?)(?![a-z0-9])", text)
    if chip is None:
        return None
    form = "pcie" if "pcie" in text or "pci-e" in text else "nvl" if re.search(r"nvl(?!ink|\d)", text) else None
    gigabytes = re.search(r"(\d{2,3}) ?g(?:i?b)?(?![a-z0-9])", text)
    found = []
    for gpu in gpus:
        parts = gpu.name.split("-")
        own_form = next((part for part in ("pcie", "nvl") if part in parts), None)
        has_memory = gigabytes is None or abs(gpu.memory_bytes / (int(gigabytes.group(1)) * 1e9) - 1) < 0.12
        if parts[0] == chip.group(1) and own_form == form and has_memory:
            found.append(gpu)
    # Where a memory is not named, the variant that the bare name of the chip means.
    return min(found, key=lambda gpu: chip.group(1) not in map(normalise_name, gpu.aliases), default=None)


def normalise_name(name: str) -> str:
    """'NVIDIA A100-SXM4-80GB' -> 'a100sxm480gb': what remains of a GPU's spelling when manners are taken off."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia|tesla|geforce)+", "", letters)


@functools.cache
def _load_shipped_gpus() -> Mapping[str, Gpu]:
    return _load_gpus((SHIPPED_GPUS_PATH,))


@functools.cache
def _load_shipped_clusters() -> Mapping[str, Cluster]:
    tables = _merge_tables((SHIPPED_CLUSTERS_PATH,))
    _raise_problems(_find_table_problems(tables, CLUSTER_RULES, _required_fields(Cluster), SHIPPED_CLUSTERS_PATH))
    return {name: Cluster(name=name, **table) for name, table in tables.items()}


def _load_gpus(paths: tuple[Path, ...]) -> dict[str, Gpu]:
    tables = _merge_tables(paths)
    problems = _find_table_problems(tables, GPU_RULES, _required_fields(Gpu) - OPTIONAL_FIELDS, paths[-1])
    _raise_problems(problems)
    gpus = {name: _build_gpu(name, table) for name, table in tables.items()}
    _raise_problems(_find_alias_problems(gpus.values(), paths[-1]))
    return gpus


def _build_gpu(name: str, table: dict[str, Any]) -> Gpu:
    values = {field: None for field in OPTIONAL_FIELDS} | table
    return Gpu(name=name, **(values | {"aliases": tuple(table.get("aliases", ()))}))


def _merge_tables(paths: tuple[Path, ...]) -> Tables:
    """The tables of all files, fields of a later file over those of an earlier one."""
    merged: Tables = {}
    for path in paths:
        for name, table in _read_tables(path).items():
            merged[name] = merged.get(name, {}) | table
    return merged


def _read_tables(path: Path) -> Tables:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: must be a readable file, got {error.strerror}. Give the path of a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a TOML file, got: {error}. Correct it there.") from error
    loose = [key for key, value in content.items() if not isinstance(value, dict)]
    if loose:
        raise ConfigError(
            f"{path}: every field must stand in a table, got {', '.join(loose)} outside of one. "
            "Put [name] on a line above."
        )
    return content


def _required_fields(kind: type) -> set[str]:
    return {field.name for field in fields(kind) if field.default is MISSING and field.name != "name"}


def _find_table_problems(
    tables: Tables, rules: Mapping[str, FieldRule], required: set[str] | frozenset[str], path: Path
) -> list[str]:
    problems = []
    for name, table in tables.items():
        for field in sorted(required - table.keys()):
            must = rules[field].find_fault(None)
            problems.append(f"{path}: [{name}] {field}: must be given as {must}, got nothing. Add it to the table.")
        for field, value in table.items():
            if field not in rules:
                problems.append(
                    f"{path}: [{name}] {field}: must be a known field, got {field}={value!r}. Use {', '.join(rules)}."
                )
            elif fault := rules[field].find_fault(value):
                problems.append(f"{path}: [{name}] {field}: must be {fault}, got {field}={value!r}. Correct it there.")
    return problems


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
