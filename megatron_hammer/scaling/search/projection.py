"""A study and its results: sizes, layouts, speed, time, energy, cost, and where scaling stops paying.

`search.py` finds the plans, `report/projection_file.py` saves them, `report/html_report.py` shows them. This module has
only types and arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import FlopConvention, StageMemory, count_flops_per_token
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.evidence.validation import Prediction
from megatron_hammer.scaling.plan import (
    NATURAL_IMBALANCE_RATIO,
    PARTS,
    PRECISIONS,
    Cluster,
    Dispatcher,
    ExpertOptions,
    Gpu,
    Plan,
    Precision,
    StepTime,
)
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, UnpredictableRow
from megatron_hammer.scaling.search.search_space import SearchSpace

# Of the estimate of memory: its mean error on published figures of reserved memory, which is what decides.
MEMORY_MARGIN_RATIO = 0.07
SECONDS_PER_DAY = 86_400.0
JOULES_PER_MWH = 3.6e9
# The work of a token in every layout. Every other part of a step depends on the layout.
COMPUTE_PARTS = ("matmul_s", "attention_s", "pointwise_s", "embedding_and_loss_s")
# Each part in words, in the order in which charts stack them.
PART_NAMES = {
    "matmul_s": "matrix products",
    "attention_s": "attention",
    "pointwise_s": "norms and activations",
    "embedding_and_loss_s": "embedding and loss",
    "recompute_s": "recomputation",
    "overhead_s": "launch overhead",
    "tensor_parallel_s": "TP communication",
    "context_parallel_s": "CP communication",
    "expert_parallel_s": "EP communication",
    "pipeline_p2p_s": "pipeline transfers",
    "bubble_s": "pipeline bubble",
    "data_parallel_s": "DP communication",
    "optimizer_s": "optimizer",
    "jitter_s": "jitter",
}
LOSS_PARTS = tuple(name for name in PARTS if name not in COMPUTE_PARTS)
# Each part of a stage's memory in words.
MEMORY_NAMES = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "buffers_bytes": "lasting buffers",
    "activations_bytes": "activations",
    "logits_bytes": "logits and loss",
    "transient_bytes": "gradients and gathers in passing",
    "context_bytes": "CUDA and NCCL (allowance)",
    "fragmentation_bytes": "fragmentation (allowance)",
}


DEFAULT_EXPERTS = ExpertOptions(imbalance_ratio=NATURAL_IMBALANCE_RATIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One question: this model on this machine at these sizes. Exactly one of the two batch fields is set."""

    model: ModelShape
    preset: str | None  # name of the shipped preset, or
    hf_config: str | None  # the file that the model was read from
    gpu: Gpu
    cluster: Cluster
    gpu_counts: tuple[int, ...]
    seq_length: int
    precision: Precision
    global_batch_size: int | None = None  # strong scaling: the same batch at every size
    samples_per_gpu: Fraction | None = None  # weak scaling: the batch grows with the size
    train_tokens: int | None = None  # the budget that days, energy and cost are for
    memory_limit_bytes: int
    memory_margin_ratio: float = MEMORY_MARGIN_RATIO  # of the estimate: layouts closer to the limit are marked
    space: SearchSpace = field(default_factory=SearchSpace)
    num_best: int = 5
    mfu_convention: FlopConvention = "A"
    usd_per_gpu_hour: float | None = None
    knee_ratio: float = 0.8
    gradient_bytes: int = 4
    vocab_divisible_by: int = 128
    experts: ExpertOptions = DEFAULT_EXPERTS

    @property
    def is_weak(self) -> bool:
        return self.samples_per_gpu is not None

    @property
    def dispatchers(self) -> tuple[Dispatcher, ...]:
        """Of experts: those that the search may choose from."""
        return self.space.dispatchers or (self.experts.dispatcher,)

    @property
    def machine(self) -> str:
        """The GPU and its cluster in words, with the GPU that the cluster is described with if that is another one."""
        of_another = "" if self.cluster.gpu == self.gpu.name else f", a cluster of {self.cluster.gpu}"
        return f"{self.gpu.name} ({self.cluster.name}{of_another})"

    def global_batch_size_at(self, num_gpus: int) -> int:
        """The batch of a step on so many GPUs; whole at every size of the study (find_study_problems)."""
        if self.samples_per_gpu is not None:
            return int(self.samples_per_gpu * num_gpus)
        assert self.global_batch_size is not None
        return self.global_batch_size


MEMORY_CAUTION = "memory: "  # how published_reach.py begins the caution about it


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a layout compares with the others of its size. standing.py computes it."""

    chance_of_best: float = 0.0  # that it, or one of its near copies, is the fastest in reality
    is_tied: bool = False  # with the fastest: their difference is smaller than its error
    num_near_copies: int = 0  # other plans of the same family (search.py) that are about as fast
    cautions: tuple[str, ...] = ()  # why it may not work as predicted (published_reach.py)

    @property
    def is_near_memory_limit(self) -> bool:
        """Whether the error of the memory model could be what its GPUs lack."""
        return any(caution.startswith(MEMORY_CAUTION) for caution in self.cautions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One plan with its prediction. `memory` is that of its heaviest pipeline stage."""

    plan: Plan
    step: StepTime
    memory: StageMemory
    standing: Standing = field(default_factory=Standing)

    @property
    def num_gpus(self) -> int:
        return self.plan.layout.world_size

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.plan.cluster.gpus_per_node)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.plan.tokens_per_step / self.step.total_s / self.num_gpus

    @property
    def bottleneck(self) -> str:
        """The largest part that is not compute (LOSS_PARTS); of equal parts, the first."""
        return max(LOSS_PARTS, key=lambda name: getattr(self.step, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """A training run to a token budget. low and high are computed from the ends of the step time's band."""

    num_steps: int
    days: float
    low_days: float
    high_days: float
    gpu_hours: float
    energy_mwh: float
    cost_usd: float | None  # None without a price


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeProjection:
    """One number of GPUs: the layout to start from, then the best one of every other family, or why there are none."""

    num_gpus: int
    global_batch_size: int
    num_candidates: int  # layouts x micro-batches x shardings that would start
    projections: tuple[Projection, ...]
    problem: str | None = None  # a sentence with its remedy; None where something fits
    least_memory_bytes: int | None = None  # the smallest need of all candidates; None without candidates

    @property
    def best(self) -> Projection | None:
        return self.projections[0] if self.projections else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The published run of the study's model that is closest to a size: see reference.py."""

    num_gpus: int  # the size of the study
    run: MeasuredRun
    step: StepTime  # as predicted for the run itself
    projection: Projection | None  # its layout at the study's size and batch; None if that does not divide

    @property
    def error_ratio(self) -> float:
        """Predicted over measured step time of the run, minus one."""
        return self.step.total_s / self.run.step_time_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Knee:
    """Where more GPUs stop paying: see find_knee. `num_gpus_beyond` is None if no size of the study is beyond it."""

    num_gpus: int
    num_gpus_beyond: int | None
    ratio: float
    threshold_ratio: float


def describe_cuts(plan: Plan) -> str:
    """The parallel sizes above one: tp=8 pp=4 vp=5 dp=16."""
    layout = plan.layout
    sizes = {
        "tp": layout.tensor_model_parallel_size,
        "cp": layout.context_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "vp": layout.virtual_pipeline_model_parallel_size,
        "ep": layout.expert_model_parallel_size,
        "dp": layout.data_parallel_size,
    }
    return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one rank"


def describe_plan(plan: Plan) -> str:
    """A plan in a few words, without what is switched off: tp=8 dp=16, micro-batch 1, full recomputation, ..."""
    words = [describe_cuts(plan), f"micro-batch {plan.micro_batch_size}"]
    if plan.model.moe is not None and plan.layout.expert_model_parallel_size > 1:
        hidden = " (overlapped)" if plan.experts.overlaps_communication else ""
        words.append(f"{plan.experts.dispatcher}{hidden}")
    if plan.recompute == "selective":
        words.append(f"recomputes {' '.join(plan.recompute_modules)}")
    elif plan.recompute != "none":
        words.append(f"{plan.recompute} recomputation")
    if plan.num_offloaded_layers:
        words.append(f"{plan.num_offloaded_layers} layers offloaded")
    if plan.offload_modules:
        words.append(f"offloads {' '.join(plan.offload_modules)}")
    if plan.optimizer_offload_ratio:
        words.append(f"{plan.optimizer_offload_ratio:.0%} of the optimizer on the host")
    sharding = {"none": "no sharding", "distributed_optimizer": "distributed optimizer", "fsdp": "FSDP"}[plan.sharding]
    words.append(sharding if plan.shard_size is None else f"{sharding} over {plan.shard_size} ranks")
    if plan.layout.context_parallel_size > 1 and plan.context_exchange != "p2p":
        words.append(f"CP by {plan.context_exchange}")
    return ", ".join(words)


def select_peak_tflops(gpu: Gpu, precision: Precision) -> float:
    """Dense peak of the matrix products of a run. Raises ConfigError if the GPU lacks the format."""
    peak = gpu.find_peak_tflops(precision)
    if peak is None:
        usable = [name for name in PRECISIONS if gpu.find_peak_tflops(name) is not None]
        raise ConfigError(
            f"precision: must be a format that the GPU has, got precision={precision}, gpu={gpu.name}. "
            f"Use one of: {', '.join(usable)}."
        )
    return peak


def estimate_mfu_ratio(projection: Projection, convention: FlopConvention) -> float:
    """Model FLOPs per second over the peak of the run's precision. Always show it with the convention's letter."""
    plan = projection.plan
    flops_per_token = count_flops_per_token(plan.model, plan.seq_length, convention)
    return projection.tokens_per_s_per_gpu * flops_per_token / (select_peak_tflops(plan.gpu, plan.precision) * 1e12)


def estimate_bill(projection: Projection, *, train_tokens: int, usd_per_gpu_hour: float | None) -> Bill:
    """Days, energy and cost of training to a budget, at the predicted step time without restarts or evaluation.

    Energy: every GPU of the run at its board's full load, and the rest of the nodes that it occupies, times the
    building's power usage effectiveness. A run that waits for communication draws less, so this is the upper side.
    """
    plan = projection.plan
    num_steps = -(-train_tokens // plan.tokens_per_step)
    elapsed_s = num_steps * projection.step.total_s
    node_power_w = projection.num_nodes * plan.cluster.cpu_power_w_per_node
    power_w = (projection.num_gpus * plan.gpu.power_w + node_power_w) * plan.cluster.power_usage_effectiveness
    gpu_hours = projection.num_gpus * elapsed_s / 3600
    return Bill(
        num_steps=num_steps,
        days=elapsed_s / SECONDS_PER_DAY,
        low_days=num_steps * projection.step.low_s / SECONDS_PER_DAY,
        high_days=num_steps * projection.step.high_s / SECONDS_PER_DAY,
        gpu_hours=gpu_hours,
        energy_mwh=power_w * elapsed_s / JOULES_PER_MWH,
        cost_usd=None if usd_per_gpu_hour is None else gpu_hours * usd_per_gpu_hour,
    )


def scaling_efficiency_ratio(sizes: Sequence[SizeProjection], size: SizeProjection) -> float | None:
    """Tokens per second and GPU, relative to the smallest size at which something fits. None if nothing fits."""
    smallest = min((other for other in sizes if other.best), key=lambda other: other.num_gpus, default=None)
    if smallest is None or smallest.best is None or size.best is None:
        return None
    return size.best.tokens_per_s_per_gpu / smallest.best.tokens_per_s_per_gpu


def find_knee(sizes: Sequence[SizeProjection], threshold_ratio: float) -> Knee | None:
    """The largest size up to which a GPU reaches at least `threshold_ratio` of its best speed at a smaller size.

    The reference is the best speed (tokens per second and GPU) of this size and all smaller ones, not the speed of the
    smallest size. At the smallest size memory is often so tight that recomputation makes it slow, and every other size
    would look good in comparison. None if nothing fits at any size.
    """
    feasible = sorted((size for size in sizes if size.best), key=lambda size: size.num_gpus)
    knee = None
    best = 0.0
    for size in feasible:
        assert size.best is not None
        speed = size.best.tokens_per_s_per_gpu
        best = max(best, speed)
        if speed < threshold_ratio * best:
            return _build_knee(knee, size.num_gpus, threshold_ratio)
        knee = (size.num_gpus, speed / best)
    return _build_knee(knee, None, threshold_ratio)


def _build_knee(knee: tuple[int, float] | None, beyond: int | None, threshold_ratio: float) -> Knee | None:
    if knee is None:
        return None
    return Knee(num_gpus=knee[0], num_gpus_beyond=beyond, ratio=knee[1], threshold_ratio=threshold_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlay:
    """Every row of a table of measured runs, in one of the two tuples.

    runs: of the study's model and GPU. left_out: rows that do not belong to the study, or that cannot be predicted.
    """

    runs: tuple[Prediction, ...] = ()
    left_out: tuple[UnpredictableRow, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """The result of a study. provenance: that of the coefficients, unchanged from their file.

    coefficients: those of the cost model; None if something else predicted the steps.
    """

    study: Study
    sizes: tuple[SizeProjection, ...]
    knee: Knee | None
    provenance: Mapping[str, Any]
    coefficients: Coefficients | None = None
    references: tuple[Reference, ...] = ()  # published runs of the study's model
    overlay: Overlay | None = None  # measured runs, where some were given
    companion: "StudyResult | None" = None  # the other way of scaling, for comparison: see build_companion_study


def build_companion_study(study: Study, sizes: Sequence[SizeProjection]) -> Study | None:
    """The same study with the batch scaled the other way and one layout per size. None if nothing fits.

    Both curves have the same batch at the middle one of the feasible sizes. The companion of a study with a fixed batch
    has the samples per GPU of that size, at every size where they make a whole batch. The companion of a study with a
    growing batch has the batch of that size.
    """
    feasible = sorted(size.num_gpus for size in sizes if size.best)
    if not feasible:
        return None
    middle = feasible[len(feasible) // 2]
    batch = study.global_batch_size_at(middle)
    if study.is_weak:
        return replace(study, global_batch_size=batch, samples_per_gpu=None, num_best=1)
    samples = Fraction(batch, middle)
    counts = tuple(count for count in study.gpu_counts if (samples * count).denominator == 1)
    return replace(study, global_batch_size=None, samples_per_gpu=samples, gpu_counts=counts, num_best=1)
