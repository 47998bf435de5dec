"""What a row's software does with memory, and what must be assumed of a run that fitted into its GPUs.

A published run was not out of memory. Where its own plan would be, and the table leaves blank what decides, the blank
takes the least measure that makes the plan fit: a smaller micro-batch, then recomputation of as few layers as possible.
Cells that the row states are never changed. A row that does not fit by them stays as it is, and validation flags it,
unless its activations alone exceed the GPU: then the cells contradict each other.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.memory.options import RecomputeModule
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage, fits_in_memory
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.run_table import RunRow
from megatron_hammer.scaling.published.software import SourceRecipe, TrainingSoftware

BLOCKWISE = r"\bsc\b|block|sub-?channel|fine-?grained"  # of a precision's cell: scales of blocks, not of tensors


def fill_memory_options(
    plan: Plan, row: RunRow, recipe: SourceRecipe | None, software: TrainingSoftware, assumptions: list[str]
) -> Plan:
    """The plan with its software's and its recipe's ways to save memory. plan: with everything that the row states.

    A run whose whole weights and gradients alone exceed the GPU can only have sharded them.
    """
    filled, texts = _fill_options(plan, row, recipe, software)
    if plan.sharding == "distributed_optimizer" and not _holds_state(filled):
        layout = replace(plan.layout, has_distributed_optimizer=False)
        filled, texts = _fill_options(replace(plan, sharding="fsdp", layout=layout), row, recipe, software)
        texts.insert(
            0, f"sharding fsdp: weights, gradients and buffers as a whole exceed the memory of {plan.gpu.name}"
        )
    assumptions += texts
    return filled


def _holds_state(plan: Plan) -> bool:
    stage = estimate_heaviest_plan_stage(plan)
    return stage.state_bytes + stage.buffers_bytes <= plan.gpu.memory_bytes


def _fill_options(
    plan: Plan, row: RunRow, recipe: SourceRecipe | None, software: TrainingSoftware
) -> tuple[Plan, list[str]]:
    """(the plan, the assumptions that it makes)."""
    texts: list[str] = []
    is_quantized = plan.precision in software.quantized_parameters and not re.search(BLOCKWISE, row.precision.lower())
    is_quantized &= plan.sharding != "none"  # Megatron gathers such parameters with a sharded optimizer only
    is_quantized &= plan.precision == "fp8" or not plan.optimizer_offload_ratio  # as has_quantized_parameters
    plan = replace(
        plan,
        has_quantized_parameters=is_quantized,
        keeps_quantized_copies=software.keeps_quantized_copies,
        recompute_modules=_select_modules(plan, row, software),
    )
    if is_quantized:
        texts.append(f"{plan.precision} parameters: {software.name}")
    if recipe is not None and recipe.master_bytes is not None and recipe.moments_bytes is not None:
        plan = replace(plan, master_bytes=recipe.master_bytes, moments_bytes=recipe.moments_bytes)
        texts.append(f"optimizer of {plan.master_bytes + plan.moments_bytes} bytes: {recipe.source}")
    # NVIDIA's recipes offload with FSDP only, and Megatron without a pipeline only (megatron.core's TransformerConfig).
    is_whole = plan.sharding == "fsdp" and plan.layout.pipeline_model_parallel_size == 1
    if recipe is None or recipe.num_offloaded_layers is None or plan.num_offloaded_layers or not is_whole:
        return plan, texts
    texts.append(f"activations of {recipe.num_offloaded_layers} layers on the host: {recipe.source}")
    return replace(plan, num_offloaded_layers=recipe.num_offloaded_layers), texts


def _select_modules(plan: Plan, row: RunRow, software: TrainingSoftware) -> tuple[RecomputeModule, ...]:
    """Of selective recomputation: what the cell names after a colon, else the software's."""
    return plan.recompute_modules if ":" in row.recompute else software.selective_modules


def fit_in_memory(plan: Plan, row: RunRow, assumptions: list[str]) -> Plan:
    """The plan with the least measure that makes it fit, of those that the row leaves open."""
    if fits_in_memory(plan):
        return plan
    for changed, text in _list_measures(plan, row):
        if fits_in_memory(changed):
            assumptions.append(f"{text}, the least with which its plan fits into {plan.gpu.name}")
            return changed
    _refuse_contradictions(plan)
    return plan


def _refuse_contradictions(plan: Plan) -> None:
    """Raise UnpredictableError if what the row states of batch and recomputation could not run on its GPU.

    The activations between the forward and the backward pass depend on little else, and are known to a percent.
    """
    activations, memory = estimate_heaviest_plan_stage(plan).activations_bytes, plan.gpu.memory_bytes
    if activations > memory:
        raise UnpredictableError(
            f"its cells contradict each other: micro-batches of {plan.micro_batch_size} with recompute "
            f"{plan.recompute} keep {activations / GIB:.0f} GiB of activations, and its GPU has {memory / GIB:.0f}"
        )


def _list_measures(plan: Plan, row: RunRow) -> Iterator[tuple[Plan, str]]:
    """What the row leaves blank, from the least measure to the largest."""
    smallest = plan
    while row.micro_batch is None and smallest.micro_batch_size % 2 == 0:
        smallest = replace(smallest, micro_batch_size=smallest.micro_batch_size // 2)
        yield smallest, f"micro_batch {smallest.micro_batch_size}: blank"
    if not _leaves_recompute_open(row):
        return
    said = "selective, of what is not said" if row.recompute else "blank"
    if smallest.recompute == "none":
        yield replace(smallest, recompute="selective"), f"recompute selective: {said}"
    layout = plan.layout
    num_chunks = layout.pipeline_model_parallel_size * layout.virtual_pipeline_model_parallel_size
    longest = -(-plan.model.num_layers // num_chunks)
    full = replace(smallest, recompute="full")
    number = _find_least(longest, lambda num: fits_in_memory(replace(full, recompute_num_layers=num)))
    if number is not None and number < longest:
        text = f"recompute full of {number} of up to {longest} layers of a model chunk: {said}"
        yield replace(full, recompute_num_layers=number), text
    yield full, f"recompute full: {said}"


def _leaves_recompute_open(row: RunRow) -> bool:
    """Whether nothing says what is recomputed: a blank, or "selective" without the modules or layers."""
    return row.recompute.lower().strip() in ("", "selective")


def _find_least(most: int, is_enough: Callable[[int], bool]) -> int | None:
    """The smallest whole number from 1 to `most` that is enough, where every larger one is too. None if none is."""
    if not is_enough(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
