"""Seconds that a step waits for the host: for activations on their way there and back, and for an optimizer that runs
there. `model/memory/offload.py` and `model/memory/estimate.py` count what moves.

The copies run beside the passes, so only what takes longer than a pass is waited for. Nothing here is fitted: no
published table times a run with and without offload.
"""

from megatron_hammer.model.memory.activations import estimate_layer_activations
from megatron_hammer.model.memory.offload import count_offloaded
from megatron_hammer.model.memory.options import Batch
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.layer_cost import LayerCost
from megatron_hammer.scaling.plan import Cluster, Plan
from megatron_hammer.scaling.plan_memory import build_memory_run

# Adam on the host reads and writes the weight and two moments, and reads the gradient, all in fp32. Between GPU and
# host go the fp32 gradient and the 16-bit weight (megatron.core.optimizer.cpu_offloading.hybrid_optimizer).
HOST_ADAM_BYTES = 3 * 8 + 4
GRADIENT_BYTES, WEIGHT_BYTES = 4, 2


def add_waits_for_host(layer: LayerCost, plan: Plan, model: ModelShape) -> LayerCost:
    """The layer with the seconds per micro-batch in which its passes wait for the link to the host, as gaps."""
    if not plan.num_offloaded_layers and not plan.offload_modules:
        return layer
    link_s = _count_moved_bytes(plan, model) / plan.cluster.host_bytes_per_s
    forward, backward = layer.time
    forward_s, backward_s = max(0.0, link_s - layer.forward_s), max(0.0, link_s - layer.backward_s)
    time = layer.time._replace(
        forward=forward._replace(gap_s=forward.gap_s + forward_s),
        backward=backward._replace(gap_s=backward.gap_s + backward_s),
    )
    return layer._replace(time=time)


def _count_moved_bytes(plan: Plan, model: ModelShape) -> float:
    """Bytes of the mean layer and a micro-batch that go to the host, and later back."""
    options = build_memory_run(plan)["options"]
    batch = Batch(micro_batch_size=plan.micro_batch_size, seq_length=plan.seq_length)
    moved = count_offloaded(model, plan.layout, batch, options)
    kept = estimate_layer_activations(model, plan.layout, batch, options).kept
    return moved + (kept - moved) * min(1.0, plan.num_offloaded_layers / plan.model.num_layers)


def estimate_host_optimizer_s(num_parameters: float, cluster: Cluster) -> float:
    """Adam over so many parameters of a rank on the host, beside the copies (--overlap-cpu-optimizer-d2h-h2d)."""
    copies_s = max(GRADIENT_BYTES, WEIGHT_BYTES) * num_parameters / cluster.host_bytes_per_s
    return max(copies_s, HOST_ADAM_BYTES * num_parameters / cluster.host_memory_bytes_per_s)
