"""Cells of a row that cannot all be true: sizes against the stated size, batch against layout, measurements.

A row with a contradiction is predicted all the same, from its most direct measurement, and the report names it. A
row whose GPUs are not the product of its parallel sizes has no layout, and is refused instead (`row_layout.py`).
"""

from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.row_step_time import count_step_flops, select_peak
from megatron_hammer.scaling.published.run_table import RunRow

LARGEST_SIZE_DIFFERENCE_RATIO = 0.05  # publications print 8 B for 8.03 B, and some leave the embedding out
LARGEST_TIME_DIFFERENCE_RATIO = 0.03  # times and throughputs have three digits
LARGEST_FLOPS_DIFFERENCE_RATIO = 0.06  # of the nearest convention: an MFU has two digits
_CONVENTIONS = ("A", "B", "C", "D", "hardware")


def find_contradictions(row: RunRow, plan: Plan) -> tuple[str, ...]:
    """A sentence for every contradiction of a row and the plan that was read from it."""
    found = (
        _compare_size(row, plan),
        _compare_batch(row, plan),
        _compare_schedule(row, plan),
        _compare_tokens(row, plan),
        _compare_tflops(row, plan),
        _compare_mfu(row, plan),
        _compare_peak(row, plan),
    )
    return tuple(sentence for sentence in found if sentence)


def _compare_size(row: RunRow, plan: Plan) -> str:
    if row.params_b is None:
        return ""
    counted = count_parameters(plan.model) / 1e9
    # A whole number may be rounded: 1 of Llama-3.2-1B's 1.24 billion.
    if row.params_b == round(counted) or abs(counted / row.params_b - 1) <= LARGEST_SIZE_DIFFERENCE_RATIO:
        return ""
    model = plan.model
    return (
        f"params_B {row.params_b:g}: {model.num_layers} layers of width {model.hidden_size} with these heads, ffn and "
        f"vocab have {counted:.4g} B parameters"
    )


def _compare_batch(row: RunRow, plan: Plan) -> str:
    if row.global_batch is None or row.global_batch == plan.global_batch_size:
        return ""
    return (
        f"global_batch {row.global_batch}: no multiple of micro_batch {plan.micro_batch_size} x dp "
        f"{plan.layout.data_parallel_size}"
    )


def _compare_schedule(row: RunRow, plan: Plan) -> str:
    # Megatron-core's schedules.py refuses fewer. More need not be a multiple of pp.
    layout, number = plan.layout, plan.num_microbatches
    pp = layout.pipeline_model_parallel_size
    if row.vpp is None or row.vpp == 1 or number >= pp:
        return ""
    return f"vpp {row.vpp}: interleaving needs at least pp {pp} micro-batches per step, the batch gives {number}"


def _compare_tokens(row: RunRow, plan: Plan) -> str:
    if row.iteration_time_s is None or row.tokens_per_s_per_gpu is None:
        return ""
    seconds = _count_tokens(row, plan) / (row.tokens_per_s_per_gpu * plan.layout.world_size)
    if abs(seconds / row.iteration_time_s - 1) <= LARGEST_TIME_DIFFERENCE_RATIO:
        return ""
    return f"iteration_time_s {row.iteration_time_s:g}: tokens_per_s_per_gpu and the batch give {seconds:.4g} s"


def _compare_tflops(row: RunRow, plan: Plan) -> str:
    if row.tflops_per_gpu is None:
        return ""
    return _compare_flops("tflops_per_gpu", row.tflops_per_gpu, _list_tflops(row, plan))


def _compare_mfu(row: RunRow, plan: Plan) -> str:
    if row.mfu is None:
        return ""
    peak, _ = select_peak(row, plan)
    return _compare_flops("mfu", row.mfu, [tflops / peak for tflops in _list_tflops(row, plan)])


def _compare_peak(row: RunRow, plan: Plan) -> str:
    """A time in another unit, or a utilisation in per cent. The peak of CPU cores is nominal, and may be exceeded."""
    limit = plan.gpu.find_peak_tflops(plan.precision)
    if limit is None or plan.cluster.full_speed_processes_per_node is not None:
        return ""
    timed = _list_tflops(row, plan)
    columns = {
        "iteration_time_s": min(timed) if timed and row.iteration_time_s is not None else 0.0,
        "tokens_per_s_per_gpu": min(timed) if timed else 0.0,
        "tflops_per_gpu": row.tflops_per_gpu or 0.0,
        "mfu": (row.mfu or 0.0) * select_peak(row, plan)[0],
    }
    # The first one, from which the others may follow.
    for name, tflops in columns.items():
        if tflops > limit:
            return f"{name} {getattr(row, name):g}: {tflops:.4g} TFLOP/s, beyond the {limit:g} of {plan.gpu.name}"
    return ""


def _compare_flops(name: str, stated: float, counted: list[float]) -> str:
    if not counted:
        return ""
    nearest = min(counted, key=lambda value: abs(value / stated - 1))
    if abs(nearest / stated - 1) <= LARGEST_FLOPS_DIFFERENCE_RATIO:
        return ""
    return f"{name} {stated:g}: the measured time gives {nearest:.3g} in the nearest of the FLOP conventions"


def _list_tflops(row: RunRow, plan: Plan) -> list[float]:
    """TFLOP/s per GPU of the measured time in every convention; none if the row has no measured time."""
    tokens = _count_tokens(row, plan)
    seconds = row.iteration_time_s
    if seconds is None and row.tokens_per_s_per_gpu is not None:
        seconds = tokens / (row.tokens_per_s_per_gpu * plan.layout.world_size)
    if seconds is None:
        return []
    per_gpu = [count_step_flops(plan, tokens, name) / plan.layout.world_size for name in _CONVENTIONS]
    per_gpu.append(count_step_flops(plan, tokens, "B", counts_multi_head=True) / plan.layout.world_size)
    return [flops / seconds / 1e12 for flops in per_gpu]


def _count_tokens(row: RunRow, plan: Plan) -> int:
    return (row.global_batch or plan.global_batch_size) * plan.seq_length
