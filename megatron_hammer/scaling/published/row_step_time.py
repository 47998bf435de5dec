"""Seconds per step from whatever a table row measured: a time, tokens, FLOP/s or a utilisation.

FLOP/s and utilisations use conventions that differ by a quarter and more. The row's `mfu_definition` names one, or its
source is known to use one. `model/flops.py` counts A to D. A "hardware" figure also counts the recomputed forward pass.
"""

import re
from dataclasses import replace

from megatron_hammer.model.accounting import FlopConvention, count_flops_per_token
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.plan import LOW_PRECISIONS, Plan
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.run_table import RunRow
from megatron_hammer.scaling.published.software import TrainingSoftware

# What a mfu_definition says -> the convention; first match wins.
_DEFINITIONS: tuple[tuple[str, str], ...] = (
    (r"hfu|incl(\.|ude) recompute|hardware flop|96bsl|sc21 formula", "hardware"),
    # Before "6n": the formula of PaLM (arXiv 2204.02311, appendix B) also starts with 6N.
    (r"2n\*t|incl\. embedding|palm|nanogpt", "D"),
    (r"(?<!non-)causal", "A"),
    (r"non-causal|full attention|2205\.05198", "B"),
    (r"6n", "C"),
)


def find_step_time(row: RunRow, plan: Plan, software: TrainingSoftware, assumptions: list[str]) -> tuple[float, str]:
    """(seconds of the row's step, the column that they were computed from), from the most direct measurement.

    The batch is the row's if it has one. A caller that rounds the batch must scale the result.
    """
    global_batch = row.global_batch or plan.global_batch_size
    tokens = global_batch * plan.seq_length
    num_gpus = plan.layout.world_size
    if row.iteration_time_s is not None:
        return row.iteration_time_s, "iteration_time_s"
    if row.tokens_per_s_per_gpu is not None:
        return tokens / (row.tokens_per_s_per_gpu * num_gpus), "tokens_per_s_per_gpu"
    convention, reason = _select_convention(row, software)
    flops = count_step_flops(plan, tokens, convention, counts_multi_head="as mha" in row.mfu_definition.lower())
    assumptions.append(f"FLOP convention {convention}: {reason}")
    if row.tflops_per_gpu is not None:
        return flops / (row.tflops_per_gpu * 1e12 * num_gpus), "tflops_per_gpu"
    if row.mfu is None:
        raise UnpredictableError("it holds no measured time, throughput or utilisation")
    peak_tflops, peak_reason = select_peak(row, plan)
    assumptions.append(f"MFU of {peak_tflops:g} TFLOP/s: {peak_reason}")
    return flops / (row.mfu * peak_tflops * 1e12 * num_gpus), "mfu"


def count_step_flops(plan: Plan, tokens: int, convention: str, *, counts_multi_head: bool = False) -> float:
    """FLOPs of `tokens` tokens of a plan's model in a convention of flops.py, or "hardware".

    "hardware", after Narayanan et al. 2021 (arXiv 2104.04473, section 5.1), is 96 B s l h^2 (1 + s/6h + V/16lh): the
    forward pass of the layers twice, their backward pass once, and the output layer once.
    """
    model: ModelShape = plan.model
    if counts_multi_head:
        model = replace(model, num_query_groups=model.num_attention_heads)
    if convention != "hardware":
        letter: FlopConvention = convention  # type: ignore[assignment]
        return float(tokens * count_flops_per_token(model, plan.seq_length, letter))
    per_token = count_flops_per_token(model, plan.seq_length, "B")
    # Forward is a third of forward and backward, so repeating the layers' forward pass adds a third of their FLOPs.
    if plan.recompute == "full":
        head = 6 * model.vocab_size * model.hidden_size
        per_token += (per_token - head) // 3
    return float(tokens * per_token)


def _select_convention(row: RunRow, software: TrainingSoftware) -> tuple[str, str]:
    text = row.mfu_definition.lower()
    for pattern, convention in _DEFINITIONS:
        if re.search(pattern, text):
            return convention, "the row's mfu_definition"
    return software.flop_convention, f"blank, {software.name}"


def select_peak(row: RunRow, plan: Plan) -> tuple[float, str]:
    """(the peak in TFLOP/s that a utilisation refers to, the reason)."""
    # A definition such as "peak 989/1979" states the peak in 16 bits first, then those in 8 and in 4 bits.
    place = 2 if plan.precision == "nvfp4" else int(plan.precision in LOW_PRECISIONS)
    stated = re.findall(r"\b\d{3,5}\b", row.mfu_definition.lower().partition("peak ")[2])
    if stated:
        return float(stated[min(place, len(stated) - 1)]), "the row's mfu_definition"
    peak_tflops = plan.gpu.find_peak_tflops(plan.precision)
    assert peak_tflops is not None  # else the row was refused
    return peak_tflops, f"the data sheet's peak in {plan.precision}"
