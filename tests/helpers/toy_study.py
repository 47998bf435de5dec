"""A hand-made machine, a predictor of a few lines and studies of small models, for tests of the search and its reports.

The predictor is a double: its coefficients are invented, but more work costs more, and what waits costs time.
"""

from typing import Any

from megatron_hammer.model.accounting import ParallelLayout, count_parameters
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import PARTS, Cluster, Gpu, Plan, StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun
from megatron_hammer.scaling.search.projection import Study, StudyResult, find_knee
from megatron_hammer.scaling.search.search import Search

GPU = Gpu(
    name="toy-gpu",
    source="invented data sheet",
    fp32_tflops=50.0,
    fp16_tflops=100.0,
    bf16_tflops=100.0,
    fp8_tflops=None,
    fp4_tflops=None,
    memory_bytes=40 * GIB,
    memory_bytes_per_s=1e12,
    power_w=400.0,
)
CLUSTER = Cluster(
    name="toy-cluster",
    source="invented <racks> & cables",
    gpu="toy-gpu",
    gpus_per_node=8,
    nvlink_domain_size=8,
    nvlink_bytes_per_s=200e9,
    nvlink_latency_s=2e-6,
    network_bytes_per_s=20e9,
    network_latency_s=5e-6,
    cpu_power_w_per_node=800.0,
    power_usage_effectiveness=1.25,
)


def predict(plan: Plan) -> StepTime:
    """Seconds that grow with the work, the cuts and the waiting; small micro-batches and cut matrices are slow."""
    layout, model = plan.layout, plan.model
    tp, cp, pp = (
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
    )
    tokens = plan.micro_batch_size * plan.seq_length // cp
    passes = plan.num_microbatches * model.num_layers / pp
    layer_s = 1e-13 * tokens * model.hidden_size**2 / tp * (1 + 700 * tp / (tokens + 100))
    parts = dict.fromkeys(PARTS, 0.0) | {
        "matmul_s": passes * layer_s,
        "attention_s": passes * 1e-12 * tokens * plan.seq_length * model.num_attention_heads / tp,
        "embedding_and_loss_s": plan.num_microbatches * 2 * layer_s,
        "recompute_s": passes * layer_s / {"none": float("inf"), "selective": 20, "full": 3}[plan.recompute],
        "tensor_parallel_s": passes * 1e-10 * tokens * (tp - 1) * (0.3 if plan.overlaps_tensor_parallel else 1.0),
        "context_parallel_s": passes * 1e-10 * tokens * (cp - 1),
        "expert_parallel_s": passes * 1e-10 * tokens * (layout.expert_model_parallel_size - 1),
        "pipeline_p2p_s": plan.num_microbatches * 1e-6 * (pp - 1) * layout.virtual_pipeline_model_parallel_size,
        "bubble_s": (pp - 1) / layout.virtual_pipeline_model_parallel_size * layer_s * model.num_layers / pp,
        "data_parallel_s": 1e-10 * count_parameters(model) / tp / pp * (0.3 if plan.overlaps_grad_reduce else 1.0),
        "optimizer_s": 1e-11
        * count_parameters(model)
        / tp
        / pp
        / (1 if plan.sharding == "none" else layout.dense_shard_size),
        "jitter_s": 1e-6 * layout.world_size,
    }
    if plan.sharding == "fsdp":
        parts["data_parallel_s"] *= 1.5
    # The bubble is of all the layer's parts, as a bound of the search takes it to be.
    busy_s = sum(
        parts[name] for name in ("attention_s", "tensor_parallel_s", "context_parallel_s", "expert_parallel_s")
    )
    parts["bubble_s"] += busy_s / plan.num_microbatches * (pp - 1) / layout.virtual_pipeline_model_parallel_size
    total_s = sum(parts.values())
    return StepTime(**parts, low_s=0.9 * total_s, high_s=1.2 * total_s)


def build_toy_study(preset: str = "hammer-1b4", **changes: Any) -> Study:
    fields: dict[str, Any] = {
        "model": select_preset(preset).model,
        "preset": preset,
        "hf_config": None,
        "gpu": GPU,
        "cluster": CLUSTER,
        "gpu_counts": (4, 8, 16),
        "seq_length": 2048,
        "precision": "bf16",
        "global_batch_size": 32,
        "train_tokens": 10**10,
        "memory_limit_bytes": 38 * GIB,
        "num_best": 3,
    }
    return Study(**(fields | changes))


def project_toy_study(study: Study, **changes: Any) -> StudyResult:
    """sizes among the changes: of a search with another model of the cost."""
    search = Search(predict=predict)
    sizes = changes.get("sizes") or tuple(search.search_plans(study, num_gpus) for num_gpus in study.gpu_counts)
    fields: dict[str, Any] = {
        "study": study,
        "sizes": sizes,
        "knee": find_knee(sizes, study.knee_ratio),
        "provenance": {"fitted_on": ["row 1", "row 2"], "cross_validation": {"median_error_ratio": 0.0512345}},
    }
    return StudyResult(**(fields | changes))


def build_llama_plan(**changes: Any) -> Plan:
    """Llama 3 8B on a node of eight H100."""
    fields: dict[str, Any] = {
        "model": select_preset("llama3-8b").model,
        "layout": ParallelLayout(data_parallel_size=8),
        "gpu": select_gpu("h100-sxm"),
        "cluster": select_cluster("dgx-h100"),
        "seq_length": 8192,
        "micro_batch_size": 1,
        "global_batch_size": 128,
    }
    return Plan(**(fields | changes))


def build_measured_run(plan: Plan, step_time_s: float, *, row_number: int = 2) -> MeasuredRun:
    """A row of a table of runs that says this of a plan."""
    return MeasuredRun(
        row_number=row_number, source="team", model=plan.model.name, gpu_type=plan.gpu.name, plan=plan,
        step_time_s=step_time_s, measured_as="iteration_time_s", assumptions=(), fingerprint="", is_megatron_style=True,
    )  # fmt: skip
