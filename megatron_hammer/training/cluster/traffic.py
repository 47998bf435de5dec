"""What the groups of a layout send in training, and latency and bandwidth from the times that it takes. Pure.

The fit is the alpha-beta model of scaling/cost/communication.py.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.model.accounting import count_rank_parameters

# As in megatron.core.distributed.DistributedDataParallel: elements of one gradient bucket.
BUCKET_PARAMETERS, BUCKET_PARAMETERS_PER_RANK = 40_000_000, 1_000_000
GRADIENT_BYTES = 4
SMALL_BYTES = (1 << 10, 1 << 14, 1 << 18)
# Of the groups that are of the machine and not of the layout, and of pairs; gloo reaches its bandwidth much earlier.
MACHINE_BYTES = {"cuda": 1 << 26, "cpu": 1 << 21}
CPU_TOKENS = 256  # rows of the products that are timed on a CPU; a GPU takes those of a micro-batch
MACHINE_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
# Which part of the message each rank sends: a ring of n ranks moves (n - 1) / n of it, an all-reduce twice that.
SENT_SHARE = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What one kind of group sends. num_bytes: of the largest message, whole tensor."""

    kind: str
    collectives: tuple[str, ...]
    num_bytes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Message sizes to time, the smallest first; the fit needs small ones for the latency."""
        return (*(size for size in SMALL_BYTES if 4 * size <= self.num_bytes), max(self.num_bytes, 2 * SMALL_BYTES[0]))


def list_traffic(plan: RunPlan) -> dict[str, Traffic]:
    """By kind of group (see rank_groups.py). Activations are in the run's precision, gradients in fp32."""
    model, layout = plan.model, plan.layout
    element_bytes = 4 if plan.precision == "fp32" else 2
    tokens = plan.batch.micro_batch_size * plan.seq_length // layout.context_parallel_size
    activation_bytes = tokens * model.hidden_size * element_bytes
    has_sequence_parallel = layout.has_sequence_parallel and layout.tensor_model_parallel_size > 1
    parameters = max(
        count_rank_parameters(model, layout, stage, vocab_divisible_by=plan.vocab_divisible_by).total
        for stage in range(layout.pipeline_model_parallel_size)
    )
    bucket = max(BUCKET_PARAMETERS, BUCKET_PARAMETERS_PER_RANK * layout.data_parallel_size)
    kv_bytes = 2 * tokens * model.num_query_groups * model.head_dim * element_bytes // layout.tensor_model_parallel_size
    machine_bytes = MACHINE_BYTES[plan.machine.platform]
    found = (
        Traffic(
            kind="tensor",
            collectives=("all-gather", "reduce-scatter") if has_sequence_parallel else ("all-reduce",),
            num_bytes=activation_bytes,
        ),
        Traffic(kind="context", collectives=("all-gather",), num_bytes=kv_bytes * layout.context_parallel_size),
        Traffic(
            kind="data",
            collectives=("reduce-scatter", "all-gather") if layout.has_distributed_optimizer else ("all-reduce",),
            num_bytes=min(parameters, bucket) * GRADIENT_BYTES,
        ),
        Traffic(
            kind="pipeline",
            collectives=("send",),
            num_bytes=activation_bytes // (layout.tensor_model_parallel_size if has_sequence_parallel else 1),
        ),
        Traffic(
            kind="expert",
            collectives=("all-to-all",),
            num_bytes=activation_bytes * (model.moe.router_topk if model.moe else 1),
        ),
        Traffic(kind="host", collectives=MACHINE_COLLECTIVES, num_bytes=machine_bytes),
        Traffic(kind="network", collectives=MACHINE_COLLECTIVES, num_bytes=machine_bytes),
    )
    return {traffic.kind: traffic for traffic in found}


class LinkFit(NamedTuple):
    """seconds = latency_s + sent bytes / bytes_per_s."""

    latency_s: float
    bytes_per_s: float


def count_sent_bytes(collective: str, num_bytes: int, group_size: int) -> float:
    """Bytes that each rank sends of a message of num_bytes (whole tensor); a send between two ranks sends all of it."""
    if collective == "send":
        return float(num_bytes)
    return SENT_SHARE[collective] * num_bytes * (group_size - 1) / group_size


def fit_link(seconds: Mapping[float, float]) -> LinkFit:
    """The fit of seconds by sent bytes, by the median of the slopes from each small size to the largest (Theil, Sen).

    A least-squares line would be drawn by the largest time alone, and one disturbed size would move it.

    Raises ValueError with fewer than two sizes.
    """
    if len(seconds) < 2:
        raise ValueError(f"a fit needs two sizes or more, got {sorted(seconds)}")
    points = sorted(seconds.items())
    largest, largest_s = points[-1]
    slope = statistics.median((largest_s - time_s) / (largest - size) for size, time_s in points[:-1])
    if slope <= 0:
        slope = largest_s / largest  # too short to tell from the latency; a lower bound of the bandwidth
    latency_s = statistics.median(max(0.0, time_s - slope * size) for size, time_s in points[: (len(points) + 1) // 2])
    return LinkFit(latency_s=latency_s, bytes_per_s=1.0 / slope)


def list_product_shapes(plan: RunPlan, device_type: str) -> list[tuple[int, int, int]]:
    """The products of a layer: QKV and both of the feed-forward, [m, k] x [k, n], on one tensor-parallel rank."""
    model, tp = plan.model, plan.layout.tensor_model_parallel_size
    tokens = plan.batch.micro_batch_size * plan.seq_length // plan.layout.context_parallel_size
    rows = min(tokens, CPU_TOKENS) if device_type == "cpu" else tokens
    ffn = model.moe.ffn_hidden_size if model.moe else model.ffn_hidden_size
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    return [
        (rows, model.hidden_size, max(1, qkv // tp)),
        (rows, model.hidden_size, max(1, 2 * ffn // tp)),
        (rows, max(1, ffn // tp), model.hidden_size),
    ]
