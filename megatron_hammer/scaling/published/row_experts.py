"""How the experts of a table row were computed: dispatcher, overlap, CUDA graphs, and what was recomputed.

The columns are those of published_moe.csv; `row_model.py` builds the experts themselves.
"""

from dataclasses import dataclass

from megatron_hammer.model.memory.options import RecomputeModule
from megatron_hammer.scaling.plan import (
    DISPATCHERS,
    RECOMPUTE_MODULES,
    CudaGraphs,
    Dispatcher,
    ExpertOptions,
)
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.row_words import name_recompute, take_statement
from megatron_hammer.scaling.published.run_table import RunRow
from megatron_hammer.scaling.published.software import TrainingSoftware


@dataclass(frozen=True, slots=True)
class DispatcherSiblings:
    """The dispatchers that each source of a file states for each kind of GPU, for rows that leave it blank."""

    dispatchers: dict[tuple[str, str], set[str]]


def read_expert_options(
    row: RunRow, software: TrainingSoftware, siblings: DispatcherSiblings, assumptions: list[str]
) -> ExpertOptions:
    """How the row's experts were computed. Blank cells are filled as its source or its other rows say."""
    if row.experts is None:
        return ExpertOptions()
    overlaps = row.overlap_ep
    if overlaps is None:
        overlaps = False
        assumptions.append("overlap_ep no: blank, Megatron's default")
    if "force_balanced" not in row.routing and "token_drop" not in row.routing:
        assumptions.append("experts are taken as balanced: its routing is blank or natural")
    return ExpertOptions(
        dispatcher=_read_dispatcher(row, software, siblings, assumptions),
        overlaps_communication=overlaps,
        has_grouped_gemm="grouped gemm off" not in row.notes.lower(),
        pads_to_capacity="token_drop" in row.routing,
    )


def _read_dispatcher(
    row: RunRow, software: TrainingSoftware, siblings: DispatcherSiblings, assumptions: list[str]
) -> Dispatcher:
    text = row.dispatcher.lower()
    for name in DISPATCHERS:
        if text == name:
            return name
    if text:
        raise UnpredictableError(f"its dispatcher {row.dispatcher!r} is not known")
    same = siblings.dispatchers.get((row.source, row.gpu_type), set())
    for name in DISPATCHERS:
        if same == {name}:
            assumptions.append(f"dispatcher {name}: blank, that of the source's other rows of this GPU")
            return name
    assumptions.append(f"dispatcher {software.dispatcher}: blank, {software.name}")
    return software.dispatcher


def collect_dispatchers(rows: list[RunRow]) -> DispatcherSiblings:
    """What each source of a file says about its dispatcher, by kind of GPU."""
    siblings = DispatcherSiblings({})
    for row in rows:
        if row.dispatcher:
            siblings.dispatchers.setdefault((row.source, row.gpu_type), set()).add(row.dispatcher.lower())
    return siblings


def read_cuda_graphs(row: RunRow, assumptions: list[str]) -> CudaGraphs:
    """What a cell such as "te:attn+moe_router+moe_preprocess" says that CUDA graphs launch."""
    text = row.cuda_graphs.lower()
    if not text:
        if row.experts is not None:
            assumptions.append("cuda_graphs none: blank, Megatron's default")
        return "none"
    if text == "none":
        return "none"
    if "full_iteration" in text:
        return "step"
    if "attn" in text:
        return "attention"
    if "router" in text:
        return "router"
    if text.startswith("yes") and "token_drop" in row.routing:
        assumptions.append("cuda_graphs step: with experts padded to their capacity, graphs hold whole layers")
        return "step"
    assumptions.append(f"cuda_graphs none: {row.cuda_graphs!r} names no part of a layer")
    return "none"


def read_recompute_modules(row: RunRow) -> tuple[RecomputeModule, ...]:
    """The modules that a cell such as "selective: layernorm+moe_act" names; the core attention where it names none."""
    # Of another recomputation, what follows a colon is a remark.
    is_selective = name_recompute(row.recompute) == "selective"
    listed = take_statement(row.recompute).partition(":")[2] if is_selective else ""
    spellings = {"norm": "layernorm", "up_proj": "mla_up_proj"}
    words = [word.strip() for word in listed.split("+")]
    named = {spellings.get(word, word) for word in words if word}
    unknown = named - set(RECOMPUTE_MODULES)
    if unknown:
        raise UnpredictableError(f"its recomputed module {sorted(unknown)[0]!r} is not known")
    return tuple(module for module in RECOMPUTE_MODULES if module in named) or ("core_attn",)
