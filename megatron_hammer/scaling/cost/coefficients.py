"""The coefficients of the performance model: what data sheets do not say, fitted to measured runs.

`coefficients.toml` holds the shipped ones with the runs they were fitted on; `calibrate.py` fits them. Each is a
physical quantity with bounds and a prior: no coefficient belongs to a source of rows.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Lt

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.files.typed import read_toml, validate
from megatron_hammer.scaling.cost.expert_coefficients import (
    EXPERT_NAMES,
    EXPERT_TABLE,
    ExpertCoefficients,
    build_prior_expert_coefficients,
)
from megatron_hammer.scaling.cost.prior import Prior
from megatron_hammer.scaling.plan import Gpu, PositiveFloat, PositiveInt

SHIPPED_PATH = Path(__file__).parent / "coefficients.toml"
MARK = "Coefficients of the performance model"  # in the first line of every file
REMEDY = "Run calibrate again."


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCoefficients:
    """How much of a data sheet one generation of GPUs delivers in large operators."""

    gemm_ratio: PositiveFloat  # of the dense 16- or 32-bit peak, in a large matrix product
    gemm_8bit_ratio: PositiveFloat
    gemm_4bit_ratio: PositiveFloat
    attention_ratio: PositiveFloat  # of the 16-bit peak, in flash attention over a long sequence
    memory_ratio: PositiveFloat  # of the memory bandwidth, in kernels bound by it
    kernel_s: PositiveFloat  # between two kernels on the device; on a CPU, all the Python work for one kernel
    num_multiprocessors: PositiveInt  # a fact, not fitted: tiles of a matrix product that run at once


# Large matrix products are known to reach 250 to 260 of 312 TFLOP/s on A100, and 690 to 740 of 989 on H100 at 700 W, so
# the spread of these ratios is small. The other ratios are known less well. Attention: published kernels, forward and
# backward together, less the exponentials (FlashAttention-2, arXiv 2307.08691, on A100; FlashAttention-3, 2407.08608,
# on H100; FlashAttention-4 and cuDNN 9.13 on B200). Blog of NVIDIA on cuBLAS 12.9 (2025): fp4 products on GB200 are 4.6
# times as fast as fp8 ones on H200 and 2.3 times as fast as its own fp8 ones, then half a year after its delivery.
_AMPERE_PRIORS = {
    "gemm_ratio": Prior(0.80, 0.5, 0.95, 0.05),
    "gemm_8bit_ratio": Prior(0.6, 0.3, 0.95, 0.01),
    "gemm_4bit_ratio": Prior(0.5, 0.2, 0.95, 0.01),
    "attention_ratio": Prior(0.62, 0.3, 0.9, 0.15),
    "memory_ratio": Prior(0.8, 0.5, 0.95, 0.1),
    "kernel_s": Prior(3e-6, 5e-7, 1.5e-5, 0.3),
}
GPU_PRIORS: dict[str, dict[str, Prior]] = {
    "volta": {
        **_AMPERE_PRIORS,
        "gemm_ratio": Prior(0.75, 0.4, 0.95, 0.15),
        "attention_ratio": Prior(0.45, 0.2, 0.9, 0.2),
    },
    "ampere": _AMPERE_PRIORS,
    "hopper": {
        **_AMPERE_PRIORS,
        "gemm_ratio": Prior(0.72, 0.4, 0.95, 0.05),
        "gemm_8bit_ratio": Prior(0.65, 0.3, 0.95, 0.1),
        "attention_ratio": Prior(0.58, 0.25, 0.9, 0.15),
    },
    "blackwell": {
        **_AMPERE_PRIORS,
        "gemm_ratio": Prior(0.68, 0.35, 0.95, 0.15),
        "gemm_8bit_ratio": Prior(0.65, 0.3, 0.95, 0.15),
        "gemm_4bit_ratio": Prior(0.65, 0.15, 0.95, 0.2),
        "attention_ratio": Prior(0.58, 0.2, 0.9, 0.2),
    },
}
# By the GPU's name, not by generation: one core of a CPU. It runs each operator when Python calls it, so nothing of the
# host's work is hidden.
GPU_PRIORS["cpu-core"] = {
    "gemm_ratio": Prior(0.6, 0.02, 1.5, 0.7),
    "gemm_8bit_ratio": Prior(0.5, 0.02, 1.0, 0.01),
    "gemm_4bit_ratio": Prior(0.5, 0.02, 1.0, 0.01),
    "attention_ratio": Prior(0.25, 0.005, 1.5, 0.7),
    "memory_ratio": Prior(0.4, 0.005, 1.5, 0.7),
    "kernel_s": Prior(6e-5, 1e-6, 1e-3, 0.7),
}
NUM_MULTIPROCESSORS = {"volta": 80, "ampere": 108, "hopper": 132, "blackwell": 148, "cpu-core": 1}
# Watts of the board per dense 16-bit TFLOP/s of the GPU that a generation's ratios describe: V100 SXM2, A100 SXM, H100
# SXM and GB200, from their data sheets.
REFERENCE_WATTS = {"volta": 300 / 125, "ampere": 400 / 312, "hopper": 700 / 989, "blackwell": 1200 / 2500}

PRIORS: dict[str, Prior] = {
    "gemm_fill_waves": Prior(0.3, 0.02, 2.0, 0.5),
    "gemm_epilogue_ratio": Prior(0.7, 0.05, 2.0, 0.5),
    "attention_fill_tokens": Prior(400.0, 20.0, 3000.0, 0.5),
    "power_exponent": Prior(0.5, 0.02, 1.0, 0.5),
    "host_s": Prior(2e-5, 3e-6, 1e-4, 0.5),
    "step_s": Prior(5e-3, 1e-4, 1e-1, 0.7),
    "nvlink_ratio": Prior(0.75, 0.4, 1.0, 0.15),
    "network_ratio": Prior(0.75, 0.3, 1.0, 0.2),
    "collective_s": Prior(1.5e-5, 2e-6, 1e-4, 0.5),
    # NCCL's cost model has 14 us between nodes and 3.4 us over NVLink for a step of the ring with large messages; the
    # clusters' latencies of a message are mostly 5 and 2 us.
    "hop_ratio": Prior(2.2, 0.5, 5.0, 0.3),
    "adaptive_congestion_ratio": Prior(0.03, 0.002, 0.3, 0.5),
    "hashed_congestion_ratio": Prior(0.1, 0.01, 0.6, 0.5),
    "exponential_exposed_ratio": Prior(0.5, 0.1, 1.0, 0.3),
    # Over fp8 with one scale per tensor. On Hopper blockwise products add up outside of the tensor cores (DeepSeek-V3,
    # arXiv 2412.19437, section 3.3.2): large ones are 1.75 times as fast as 16-bit ones (blog on cuBLAS 12.9), those
    # with one scale about 1.9 times. mxfp8 also rearranges its scales for the tensor cores.
    "blockwise_gemm_ratio": Prior(0.9, 0.5, 1.0, 0.1),
    "mxfp8_gemm_ratio": Prior(0.95, 0.6, 1.05, 0.05),
    # NVIDIA's MLPerf submissions with 512 H100 became 27% faster in the year after June 2023 by software alone.
    "immaturity_ratio": Prior(0.5, 0.02, 1.5, 0.4),
    "maturing_years": Prior(1.2, 0.4, 3.0, 0.25),
    "tensor_exposed_ratio": Prior(0.5, 0.1, 1.0, 0.3),
    "data_exposed_ratio": Prior(0.15, 0.01, 1.0, 0.5),
    "context_exposed_ratio": Prior(0.15, 0.01, 1.0, 0.5),
    "pipeline_exposed_ratio": Prior(0.2, 0.01, 1.0, 0.5),
    "fsdp_exposed_ratio": Prior(0.2, 0.01, 1.0, 0.5),
    "jitter_ratio": Prior(0.006, 0.0005, 0.05, 0.5),
}


# When a generation was delivered whose tensor cores need kernels of a new kind: wgmma with TMA, and tcgen05 (CUTLASS).
# Volta's and Ampere's products ran at full speed with the kernels of their first libraries.
FIRST_DELIVERED = {"hopper": 2022.8, "blackwell": 2024.9}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Coefficients:
    """All coefficients, and the runs they were fitted to. Compared by identity, which makes it a cheap cache key."""

    gpus: Mapping[str, GpuCoefficients]  # by generation, or by the name of one GPU
    gemm_fill_waves: PositiveFloat  # waves of tiles lost per matrix product, to fill and empty the multiprocessors
    gemm_epilogue_ratio: PositiveFloat  # of the time to write a matrix product's result that nothing hides
    attention_fill_tokens: PositiveFloat  # sequence length at which flash attention reaches half its speed
    power_exponent: PositiveFloat  # speed of products over the board's watts per peak TFLOP/s, in one generation
    host_s: PositiveFloat  # of the host to launch one kernel, including all Python work for it
    step_s: PositiveFloat  # of the host, once per step
    nvlink_ratio: PositiveFloat  # of the bandwidth inside a domain that a large collective reaches
    network_ratio: PositiveFloat
    collective_s: PositiveFloat  # to start a collective, besides the latency of the wires
    hop_ratio: PositiveFloat  # of a step of a collective, over the latency of the wires
    adaptive_congestion_ratio: PositiveFloat  # of the time on the network, each time the leaves grow by a factor of e
    hashed_congestion_ratio: PositiveFloat
    exponential_exposed_ratio: PositiveFloat  # of attention's exponentials, which tensor cores wait for
    blockwise_gemm_ratio: PositiveFloat  # speed of products over that of fp8 with one scale per tensor
    mxfp8_gemm_ratio: PositiveFloat
    immaturity_ratio: PositiveFloat  # of the device's work, when a generation with new kernels is launched
    maturing_years: PositiveFloat  # in which this shrinks by a factor of e
    tensor_exposed_ratio: PositiveFloat  # of tensor-parallel communication, where it is overlapped with products
    data_exposed_ratio: PositiveFloat  # of gradients' and parameters' communication at least, where it is overlapped
    context_exposed_ratio: PositiveFloat  # of the exchange of keys and values at least
    pipeline_exposed_ratio: PositiveFloat  # of the exchange between interleaved stages
    fsdp_exposed_ratio: PositiveFloat  # of gathers and reductions by layer at least: they slow what runs beside them
    jitter_ratio: PositiveFloat  # of the step's time, each time the number of nodes grows by a factor of e
    experts: ExpertCoefficients = field(default_factory=build_prior_expert_coefficients)
    band_ratio: Mapping[str, float] = field(default_factory=lambda: {"default": 0.2})  # exp(+-) holds 80 %, by class
    layout_correlation: float = 0.75  # of the errors of two layouts of one job, for each step between them
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def select_gpu(self, gpu: Gpu) -> GpuCoefficients:
        """The coefficients of this GPU if it was calibrated, otherwise those of its generation."""
        return self.gpus.get(gpu.name) or self.gpus[select_generation(gpu)]


def select_generation(gpu: Gpu) -> str:
    """The generation, from the formats that a GPU multiplies in: fp4 Blackwell, fp8 Hopper (and Ada), bf16 Ampere."""
    if gpu.fp4_tflops:
        return "blackwell"
    if gpu.fp8_tflops:
        return "hopper"
    return "ampere" if gpu.bf16_tflops else "volta"


SHARED_NAMES = tuple(PRIORS)
GPU_NAMES = tuple(GPU_PRIORS["ampere"])


def build_prior_coefficients() -> Coefficients:
    """The coefficients before any run: the value of every prior."""
    gpus = {
        generation: GpuCoefficients(
            **{name: prior.value for name, prior in priors.items()},
            num_multiprocessors=NUM_MULTIPROCESSORS[generation],
        )
        for generation, priors in GPU_PRIORS.items()
    }
    shared: dict[str, Any] = {name: prior.value for name, prior in PRIORS.items()}
    return Coefficients(gpus=gpus, **shared)


def flatten_coefficients(coefficients: Coefficients) -> dict[str, float]:
    """Every fitted number by its name: "hopper.gemm_ratio", "network_ratio"; inverse of `replace_values`."""
    values = {name: getattr(coefficients, name) for name in SHARED_NAMES}
    for gpu, own in coefficients.gpus.items():
        values |= {f"{gpu}.{name}": getattr(own, name) for name in GPU_NAMES}
    return values | {f"{EXPERT_TABLE}.{name}": getattr(coefficients.experts, name) for name in EXPERT_NAMES}


def replace_values(coefficients: Coefficients, values: Mapping[str, float]) -> Coefficients:
    """The coefficients with some numbers changed, by the names of `flatten_coefficients`."""
    shared: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    changed: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        # The last dot parts the two: the name of a GPU may have dots, that of a coefficient has none.
        gpu, dot, own = name.rpartition(".")
        if dot:
            changed.setdefault(gpu, {})[own] = value
    gpus = {gpu: replace(own, **changed.get(gpu, {})) for gpu, own in coefficients.gpus.items()}
    experts = replace(coefficients.experts, **changed.get(EXPERT_TABLE, {}))
    return replace(coefficients, gpus=gpus, experts=experts, **shared)


def load_coefficients(path: Path | None = None) -> Coefficients:
    """Coefficients of a file, by default the shipped ones.

    Raises ConfigError for a file that lacks a coefficient or has an unknown one, naming all of them at once.
    """
    # Coefficients are compared by identity. Loading the shipped file twice would miss every cache of the cost model.
    return _load_shipped() if path is None else _load(path)


@lru_cache(maxsize=1)
def _load_shipped() -> Coefficients:
    return _load(SHIPPED_PATH)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankingTable:
    layout_correlation: Annotated[float, Gt(0), Lt(1)] = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class _CoefficientsFile:
    """The tables of a coefficients file."""

    shared: Mapping[str, PositiveFloat]
    gpu: Mapping[str, GpuCoefficients]
    experts: ExpertCoefficients
    band: Mapping[str, PositiveFloat] = field(default_factory=lambda: {"default": 0.2})
    ranking: _RankingTable = field(default_factory=_RankingTable)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def _load(path: Path) -> Coefficients:
    file = read_toml(path, _CoefficientsFile, remedy=REMEDY, raises=ConfigError, allows_unknown=False)
    return _build(file, str(path), REMEDY)


def list_tables(coefficients: Coefficients) -> dict[str, Any]:
    """The coefficients as plain values with all digits, without their provenance; inverse of `read_tables`."""
    return {
        "shared": {name: getattr(coefficients, name) for name in SHARED_NAMES},
        "gpu": {name: asdict(own) for name, own in coefficients.gpus.items()},
        EXPERT_TABLE: asdict(coefficients.experts),
        "band": dict(coefficients.band_ratio),
        "ranking": {"layout_correlation": coefficients.layout_correlation},
    }


def read_tables(tables: Mapping[str, Any], *, where: str) -> Coefficients:
    """Coefficients of `list_tables`. Raises ConfigError, naming every coefficient that is absent or unknown."""
    remedy = "Another version wrote this file: write it again with this one."
    file = validate(tables, _CoefficientsFile, where=where, remedy=remedy, raises=ConfigError, allows_unknown=False)
    return _build(file, where, remedy)


def _build(file: _CoefficientsFile, path: str, remedy: str) -> Coefficients:
    known, given = set(SHARED_NAMES), set(file.shared)
    faults = {
        "shared must hold only known coefficients, got ": given - known,
        "shared must hold every coefficient, got none of ": known - given,
        # A GPU without coefficients of its own takes those of its generation (select_gpu), so none may be absent.
        "gpu must have every generation, got no ": set(GPU_PRIORS) - set(file.gpu),
    }
    problems = [f"{path}: {fault}{', '.join(sorted(names))}. {remedy}" for fault, names in faults.items() if names]
    if problems:
        raise ConfigError(*problems)
    shared: dict[str, Any] = dict(file.shared)
    return Coefficients(
        gpus=file.gpu,
        experts=file.experts,
        **shared,
        band_ratio=file.band,
        layout_correlation=file.ranking.layout_correlation,
        provenance=file.provenance,
    )


def format_coefficients(coefficients: Coefficients) -> str:
    """The text of a file that `load_coefficients` reads back to equal numbers."""
    lines = [f"# {MARK}, written by `scaling_study.py calibrate`.", "", "[shared]"]
    lines += [f"{name} = {getattr(coefficients, name):.6g}" for name in SHARED_NAMES]
    for gpu, own in coefficients.gpus.items():
        # Quoted, because a dot in a bare key of TOML starts a table inside the table.
        lines += ["", f"[gpu.{json.dumps(gpu)}]"]
        lines += [f"{name} = {format_toml_value(value)}" for name, value in asdict(own).items()]
    lines += ["", f"[{EXPERT_TABLE}]"]
    lines += [f"{name} = {format_toml_value(value)}" for name, value in asdict(coefficients.experts).items()]
    lines += ["", "# exp(+-ratio) about a prediction holds 80 % of cross-validated rows of the class", "[band]"]
    lines += [f"{json.dumps(name)} = {ratio:.4f}" for name, ratio in coefficients.band_ratio.items()]
    lines += ["", "# correlation of the errors of two layouts of one job, one step (a size doubled) apart", "[ranking]"]
    lines += [f"layout_correlation = {coefficients.layout_correlation:.4f}", "", "[provenance]"]
    # TOML: values of a table stand before its inner tables. After an inner header they would belong to that table.
    for key, value in coefficients.provenance.items():
        if not isinstance(value, Mapping):
            lines.append(f"{key} = {format_toml_value(value)}")
    for key, value in coefficients.provenance.items():
        if isinstance(value, Mapping):
            lines += ["", f"[provenance.{key}]"]
            lines += [f"{json.dumps(name)} = {format_toml_value(item)}" for name, item in value.items()]
    return "\n".join(lines) + "\n"


def save_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Write a coefficients file; an incomplete file never gets this name. OutputError if another file has it."""
    publish_results({path: format_coefficients(coefficients)}, mark=MARK)


def format_toml_value(value: Any) -> str:
    """A TOML value. JSON's strings, numbers and lists are valid TOML. A long list gets one line per entry."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and len(value) > 6:
        return "[\n" + "".join(f"  {json.dumps(item)},\n" for item in value) + "]"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
