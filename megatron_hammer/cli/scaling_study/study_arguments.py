"""The command line of a study: its flags, and the Study that they ask for. The recipe supplies the defaults.

`project.py` adds the flags of the output; `scaling/search/study_problems.py` checks the values.
"""

import argparse
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.memory.options import OFFLOAD_MODULES
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.presets.preset import Recipe
from megatron_hammer.scaling.hardware.catalogue import (
    load_clusters,
    select_cluster,
    select_default_cluster,
    select_gpu,
)
from megatron_hammer.scaling.plan import DISPATCHERS, NATURAL_IMBALANCE_RATIO, PRECISIONS, Cluster, ExpertOptions, Gpu
from megatron_hammer.scaling.search.projection import MEMORY_MARGIN_RATIO, Study
from megatron_hammer.scaling.search.search_space import RECOMPUTES, SHARDINGS, SIZE_FLAGS, SearchSpace, is_cpu_host
from megatron_hammer.scaling.search.study_problems import find_study_problems, refuse_without_experts

# Of a GPU's memory that a plan may need by default: the rest is for the error of the estimate.
USABLE_MEMORY_RATIO = 0.95
TOKEN_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

EXACT_NUMBER = re.compile(r"[-+]?[\d_]{0,20}(\.[\d_]{0,20})?(e[-+]?\d{1,2})?(/[\d_]{1,20})?", re.IGNORECASE)


def add_study_arguments(parser: argparse.ArgumentParser, *, has_machine: bool = True, has_budget: bool = True) -> None:
    """Model, machine, run and restrictions of a study.

    has_machine: whether one machine is chosen here. `compare` chooses several, all with the same batch.
    has_budget: whether tokens and a price are asked for. `sensitivity` compares times per token.
    """
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", help="a shipped model; its recipe supplies the defaults")
    model.add_argument(
        "--hf-config", type=Path, metavar="PATH", help="config.json of a Hugging Face model, or its folder"
    )
    machine = parser.add_argument_group("machine")
    if has_machine:
        _add_machine_arguments(machine, has_budget)
    _add_file_arguments(machine)
    _add_run_arguments(parser, has_machine, has_budget)
    _add_restrictions(parser)
    # What build_study reads, for the commands that have no flag for it. A flag that is added later has its own default.
    parser.set_defaults(top=1, knee=0.8, mfu_convention="A")
    if not has_machine:
        parser.set_defaults(memory_gib=None, samples_per_gpu=None)
    if not has_budget:
        parser.set_defaults(train_tokens=None, usd_per_gpu_hour=None)


def _add_machine_arguments(machine: argparse._ArgumentGroup, has_price: bool) -> None:
    machine.add_argument("--gpu", required=True, help="a GPU of gpus.toml, such as h100-sxm")
    machine.add_argument("--cluster", help="a cluster of clusters.toml (default: the first one of this GPU)")
    machine.add_argument("--gpus", required=True, metavar="N,N,...", help="numbers of GPUs")
    machine.add_argument("--memory-gib", type=float, help="what a plan may need of a GPU (default: 95%% of its memory)")
    if has_price:
        machine.add_argument(
            "--usd-per-gpu-hour", type=float, metavar="USD", help="price (default: the cluster's, if known)"
        )


def _add_file_arguments(machine: argparse._ArgumentGroup) -> None:
    machine.add_argument("--gpus-file", type=Path, metavar="TOML", help="GPUs of your own, added to the shipped ones")
    machine.add_argument("--clusters-file", type=Path, metavar="TOML", help="clusters of your own")
    machine.add_argument("--coefficients", type=Path, metavar="TOML", help="coefficients of your own, from calibrate")


def _add_run_arguments(parser: argparse.ArgumentParser, has_samples_per_gpu: bool, has_budget: bool) -> None:
    run = parser.add_argument_group("run")
    batch = run.add_mutually_exclusive_group()
    batch.add_argument(
        "--global-batch-size", type=int, metavar="N", help="samples per step at every size (default: the recipe's)"
    )
    if has_samples_per_gpu:
        batch.add_argument(
            "--samples-per-gpu", metavar="N", help="samples per step and GPU, so that the batch grows; also 0.25 or 1/4"
        )
    run.add_argument(
        "--seq-length", type=int, metavar="TOKENS", help="(default: the recipe's, or the config's longest)"
    )
    run.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="(default: the recipe's, or bf16)",
    )
    if has_budget:
        run.add_argument("--train-tokens", metavar="TOKENS", help="budget; 15T or 15e12 (default: the recipe's)")
    run.add_argument(
        "--moe-dispatcher",
        metavar="NAME,...",
        help=f"ways of tokens to their experts that are installed, of {', '.join(DISPATCHERS)}: each layout takes the "
        "fastest (default: alltoall)",
    )
    run.add_argument(
        "--moe-imbalance",
        type=float,
        metavar="RATIO",
        help=f"tokens of the busiest rank of experts over the mean (default: {NATURAL_IMBALANCE_RATIO})",
    )
    run.add_argument("--grad-reduce-in-bf16", action="store_true", help="gradients travel in 2 bytes instead of 4")


def _add_restrictions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("restrictions of the search (default: everything that fits)")
    for flag in SIZE_FLAGS.values():
        group.add_argument(f"--{flag}", metavar="N,N,...")
    group.add_argument("--recompute", metavar="NAME,...", help=f"of {', '.join(RECOMPUTES)}")
    group.add_argument("--sharding", metavar="NAME,...", help=f"of {', '.join(SHARDINGS)}")
    group.add_argument(
        "--cpu-offloading-num-layers",
        type=int,
        default=0,
        metavar="N",
        help="layers whose activations wait in the host's memory (default: 0)",
    )
    group.add_argument(
        "--offload-modules",
        metavar="NAME,...",
        help=f"modules whose inputs wait there, of {', '.join(OFFLOAD_MODULES)} (default: none)",
    )
    group.add_argument(
        "--optimizer-offload-fraction",
        type=float,
        default=0.0,
        metavar="RATIO",
        help="share of the optimizer that is kept and run on the host (default: 0)",
    )
    group.add_argument(
        "--memory-margin",
        type=float,
        default=MEMORY_MARGIN_RATIO,
        metavar="RATIO",
        help="what the estimate of memory may be off: layouts closer to the limit are marked, and not recommended over "
        "a tie (default: %(default)s, the error on published figures)",
    )
    for flag in ("--tp-comm-overlap", "--moe-comm-overlap"):
        group.add_argument(flag, choices=("auto", "off"), default="auto", help="(default: where possible)")


def build_study(arguments: argparse.Namespace, read_hf_model: Callable[[Path], ModelShape]) -> Study:
    """The study that the flags ask for; ConfigError with every problem of their values."""
    problems: list[str] = []
    model, recipe = _select_model(arguments, read_hf_model)
    gpu, cluster = _select_machine(arguments)
    study = Study(
        model=model,
        preset=arguments.preset,
        hf_config=None if arguments.hf_config is None else str(arguments.hf_config),
        gpu=gpu,
        cluster=cluster,
        gpu_counts=_parse_counts("gpus", arguments.gpus, problems),
        seq_length=_first(arguments.seq_length, recipe and recipe.seq_length, model.max_position_embeddings),
        precision=_first(arguments.precision, recipe and recipe.precision, "bf16"),
        train_tokens=_first(_parse_tokens(arguments.train_tokens, problems), recipe and recipe.train_tokens),
        memory_limit_bytes=_count_bytes(gpu, arguments.memory_gib),
        memory_margin_ratio=arguments.memory_margin,
        space=(space := _build_space(arguments, problems)),
        num_best=arguments.top,
        mfu_convention=arguments.mfu_convention,
        usd_per_gpu_hour=_first(arguments.usd_per_gpu_hour, cluster.usd_per_gpu_hour),
        knee_ratio=arguments.knee,
        # Bytes per element: bf16 or fp32.
        gradient_bytes=2 if arguments.grad_reduce_in_bf16 else 4,
        experts=ExpertOptions(
            dispatcher="alltoall" if space.dispatchers is None else space.dispatchers[0],
            imbalance_ratio=_first(arguments.moe_imbalance, NATURAL_IMBALANCE_RATIO),
        ),
        **_select_batch(arguments, recipe, problems),
    )
    if model.moe is None and arguments.moe_imbalance is not None:
        problems.append(refuse_without_experts("moe-imbalance", model.name))  # also of its default value
    problems += find_study_problems(study)
    if problems:
        # Each once: a stand-in value may cause a problem that is already listed.
        raise ConfigError(*dict.fromkeys(problems))
    return study


def _count_bytes(gpu: Gpu, memory_gib: float | None) -> int:
    """What a plan may need of a GPU. Exact, because a float overflows for numbers that are refused later."""
    if memory_gib is None:
        return round(gpu.memory_bytes * USABLE_MEMORY_RATIO)
    return round(Fraction(memory_gib) * GIB)


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next((value for value in values if value is not None), None)


def _select_model(
    arguments: argparse.Namespace, read_hf_model: Callable[[Path], ModelShape]
) -> tuple[ModelShape, Recipe | None]:
    # argparse requires exactly one of --preset and --hf-config.
    if arguments.preset is not None:
        preset = select_preset(arguments.preset)
        return preset.model, preset.recipe
    return read_hf_model(arguments.hf_config), None


def _select_machine(arguments: argparse.Namespace) -> tuple[Gpu, Cluster]:
    gpus_path, clusters_path = arguments.gpus_file, arguments.clusters_file
    gpu = select_gpu(arguments.gpu, gpus_path)
    if arguments.cluster is None:
        return gpu, select_default_cluster(gpu.name, clusters_path, gpus_path=gpus_path)
    cluster = select_cluster(arguments.cluster, clusters_path, gpus_path=gpus_path)
    if cluster.gpu != gpu.name:
        clusters = load_clusters(clusters_path, gpus_path=gpus_path).values()
        if is_cpu_host(cluster) or any(is_cpu_host(one) for one in clusters if one.gpu == gpu.name):
            raise ConfigError(
                f"cluster: must be of CPU processes for CPU cores only, got cluster={cluster.name}, gpu={gpu.name}. "
                "Leave --cluster out, or pass one of this GPU."
            )
        print(
            f"note: cluster {cluster.name} is described with {cluster.gpu}; its links, nodes and price are taken for "
            f"{gpu.name}",
            file=sys.stderr,
        )
    return gpu, cluster


def _select_batch(arguments: argparse.Namespace, recipe: Recipe | None, problems: list[str]) -> dict[str, Any]:
    """Exactly one of Study's two batch fields."""
    if arguments.samples_per_gpu is not None:
        try:
            # Exact: 0.1 samples on each of 10 GPUs must be one sample, which products of floats need not give.
            return {"samples_per_gpu": _parse_exactly(arguments.samples_per_gpu)}
        except (ValueError, ZeroDivisionError):
            problems.append(
                f"samples-per-gpu: must be a number or a fraction, got {arguments.samples_per_gpu!r}. "
                "Pass 2, 0.5 or 1/4."
            )
            # A stand-in, with which the other flags can still be checked. The problem ends the command later.
            return {"samples_per_gpu": Fraction(1)}
    if arguments.global_batch_size is not None:
        return {"global_batch_size": arguments.global_batch_size}
    if recipe is None:
        problems.append(
            "global-batch-size: must be given for a model without a recipe, got none. "
            "Pass --global-batch-size or --samples-per-gpu."
        )
        return {"global_batch_size": 1}
    return {"global_batch_size": recipe.global_batch_size}


def _parse_exactly(text: str) -> Fraction:
    """ValueError unless it is a number of a size that is meant: 1e999999999 alone would need all memory."""
    if not EXACT_NUMBER.fullmatch(text):
        raise ValueError(text)
    return Fraction(text)


def _parse_counts(flag: str, text: str, problems: list[str]) -> tuple[int, ...]:
    """'8,64' -> (8, 64)."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        problems.append(f"{flag}: must be whole numbers with commas between them, got {text!r}. Pass --{flag} 8,64.")
        # A stand-in, as in _select_batch.
        return (1,)


def _parse_tokens(text: str | None, problems: list[str]) -> int | None:
    """'15T', '15e12' or '15_000' -> a number of tokens."""
    if text is None:
        return None
    # [-1:] and not [-1], which fails on an empty text.
    factor = TOKEN_SUFFIXES.get(text[-1:].upper(), 1)
    try:
        # Fraction and not float: 1.4T is then exactly 1,400,000,000,000.
        tokens = _parse_exactly(text[:-1] if factor > 1 else text) * factor
    except (ValueError, ZeroDivisionError):
        problems.append(f"train-tokens: must be a number of tokens, got {text!r}. Pass 15T, 300B or 2e9.")
        return None
    return int(tokens)


def _build_space(arguments: argparse.Namespace, problems: list[str]) -> SearchSpace:
    sizes = {}
    for name, flag in SIZE_FLAGS.items():
        text = getattr(arguments, flag.replace("-", "_"))
        sizes[name] = None if text is None else _parse_counts(flag, text, problems)
    return SearchSpace(
        **sizes,
        recomputes=_parse_names("recompute", arguments.recompute, RECOMPUTES, problems),
        shardings=_parse_names("sharding", arguments.sharding, SHARDINGS, problems),
        # None lets the search decide for each layout.
        overlaps_tensor_parallel=False if arguments.tp_comm_overlap == "off" else None,
        num_offloaded_layers=arguments.cpu_offloading_num_layers,
        offload_modules=()
        if arguments.offload_modules is None
        else _parse_names("offload-modules", arguments.offload_modules, OFFLOAD_MODULES, problems),
        optimizer_offload_ratio=arguments.optimizer_offload_fraction,
        overlaps_experts=False if arguments.moe_comm_overlap == "off" else None,
        dispatchers=None
        if arguments.moe_dispatcher is None
        else _parse_names("moe-dispatcher", arguments.moe_dispatcher, DISPATCHERS, problems),
    )


def _parse_names(flag: str, text: str | None, known: tuple[Any, ...], problems: list[str]) -> tuple[Any, ...]:
    """Names of a flag, in the order in which they are known."""
    if text is None:
        return known
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        problems.append(f"{flag}: must be of {', '.join(known)}, got {', '.join(unknown)}. Pass --{flag} {known[1]}.")
    # Never empty: after a problem, the search space must still be valid for the other checks.
    return tuple(name for name in known if name in names) or known
