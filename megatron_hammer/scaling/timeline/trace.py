"""A predicted step as a timeline: every pass of every pipeline stage, in Chrome's trace format.

chrome://tracing and ui.perfetto.dev open it. It draws the numbers that cost/step_time.py adds up (build_step_costs) in
the order in which Megatron runs the passes (schedule.py), and has no model of its own. Ranks of one stage do the same
at the same time, so each stage is one process of the trace. Its tracks:

- step: passes, waits, the communication that nothing hides, and the optimizer. It has no gap, and ends after exactly
  the predicted step time.
- parts: what each pass consists of, in the names of StepTime. The order inside a pass is arbitrary.
- beside: communication over data- and tensor-parallel ranks that passes hide. Its place within a pass is arbitrary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.data_parallel import estimate_hidden_fsdp_s
from megatron_hammer.scaling.cost.layer_cost import estimate_hidden_tensor_s
from megatron_hammer.scaling.cost.pipeline import list_chunk_layers
from megatron_hammer.scaling.cost.step_time import StepCosts, build_step_costs, predict_step
from megatron_hammer.scaling.plan import Plan, StepTime
from megatron_hammer.scaling.search.projection import PART_NAMES, describe_plan
from megatron_hammer.scaling.timeline.schedule import Pass, PlacedPass, place_passes
from megatron_hammer.scaling.timeline.stage_chunks import StageChunk, find_slowest_rank, list_stage_chunks, select_parts

STEP_TRACK, PARTS_TRACK, GATHER_TRACK, REDUCE_TRACK, FSDP_TRACK, TENSOR_TRACK = range(6)
TRACK_NAMES = (
    "step",
    "parts of the passes",
    "parameters gathered beside",
    "gradients reduced beside",
    "FSDP beside the layers",
    "tensor parallelism beside the products",
)
FORMAT = "megatron_hammer.scaling.trace"
MOST_SPANS = 1_000_000  # of a file that the viewers still open
WAIT = "wait for other stages"
ROUNDING_RATIO = 1e-9  # sums of many spans differ by less


class Span(NamedTuple):
    """A stretch of one track of one pipeline stage, in seconds of the step."""

    pp_rank: int
    track: int
    name: str
    category: str
    start_s: float
    end_s: float
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTrace:
    """A predicted step as spans.

    pass_ratio: length of the drawn passes over the predicted ones. It is below 1 where the passes, in Megatron's order,
    take longer than the closed formula of cost/pipeline.py says: they are drawn shorter, so that the step is as long as
    predicted.
    """

    plan: Plan
    step: StepTime
    slowest_pp_rank: int  # the stage that sets the pace, whose parts are those of `step`
    pass_ratio: float
    spans: tuple[Span, ...]


def build_trace(plan: Plan, coefficients: Coefficients, *, has_parts: bool = True) -> StepTrace:
    """The predicted step of a plan. has_parts: whether the track of the passes' parts is drawn.

    Raises ConfigError for a step of more than MOST_SPANS spans.
    """
    _check_number_of_spans(plan, has_parts)
    costs = build_step_costs(plan, coefficients)
    step = predict_step(plan, coefficients)
    stages = list_stage_chunks(plan, costs)
    slowest = find_slowest_rank(plan, costs)
    m, pp = plan.num_microbatches, plan.layout.pipeline_model_parallel_size
    slowest_s = costs.stages[costs.schedule.slowest].total_s + costs.send_s
    pipeline_s = m * slowest_s + costs.schedule.bubble_s + costs.fill_send_s
    placed = place_passes(
        pp,
        plan.layout.virtual_pipeline_model_parallel_size,
        m,
        lambda rank, work: sum(select_parts(stages[rank], work).values()),
        way_s=costs.fill_send_s / (2 * (pp - 1)) if pp > 1 else 0.0,  # each way once down and once up
    )
    pass_ratio = pipeline_s / max(works[-1].end_s for works in placed)
    if pass_ratio > 1 - ROUNDING_RATIO:
        pass_ratio = 1.0
    data = costs.data_parallel
    outside_s = data.exposed_s + costs.optimizer_s + costs.step_s
    # Where processes share cores (CPU hosts), every part takes longer by the same factor.
    slowdown = (step.total_s - step.jitter_s) / (pipeline_s + outside_s)
    clock = _Clock(data.exposed_gather_s, pipeline_s, pass_ratio, slowdown, step)
    hidden = _list_hidden(plan, costs, coefficients)
    spans: list[Span] = []
    for rank, works in enumerate(placed):
        spans += _draw_step(rank, works, stages[rank], costs, clock)
        if has_parts:
            spans += _draw_parts(rank, works, stages[rank], clock)
        spans += _draw_beside(rank, works, costs, clock)
        for one in hidden:
            spans += _draw_beside_passes(rank, works, stages[rank], clock, one)
    return StepTrace(plan=plan, step=step, slowest_pp_rank=slowest, pass_ratio=pass_ratio, spans=tuple(spans))


def _check_number_of_spans(plan: Plan, has_parts: bool) -> None:
    layout = plan.layout
    passes = 2 * plan.num_microbatches * layout.pipeline_model_parallel_size
    passes *= layout.virtual_pipeline_model_parallel_size
    # A pass has up to ten parts, a wait before it, and two kinds of communication beside it.
    spans = passes * (14 if has_parts else 4)
    if spans > MOST_SPANS:
        remedy = "Pass --detail passes, or choose" if has_parts else "Choose"
        raise ConfigError(
            f"row: must have at most about {MOST_SPANS:,} spans, got {passes:,} passes of "
            f"{plan.num_microbatches:,} micro-batches. {remedy} a row with fewer micro-batches or stages."
        )


# --- spans -----------------------------------------------------------------------------------------------------------


class _Clock(NamedTuple):
    """From the seconds of the schedule to those of the step: parameters are gathered before the first pass."""

    gather_s: float
    pipeline_s: float
    pass_ratio: float
    slowdown: float
    step: StepTime

    def tell(self, schedule_s: float) -> float:
        return self.slowdown * (self.gather_s + self.pass_ratio * schedule_s)


def _draw_step(
    rank: int, works: Sequence[PlacedPass], chunks: Sequence[StageChunk], costs: StepCosts, clock: _Clock
) -> Iterator[Span]:
    """The track without gaps: each span begins where the one before it ended."""
    now_s = clock.tell(0.0)
    if now_s > 0:
        yield Span(rank, STEP_TRACK, "gather parameters", "data_parallel_s", 0.0, now_s, {})
    for work, start_s, end_s in works:
        start_s, end_s = clock.tell(start_s), clock.tell(end_s)
        if start_s > now_s:
            yield Span(rank, STEP_TRACK, WAIT, "bubble_s", now_s, start_s, {})
        yield Span(
            rank, STEP_TRACK, _name_pass(work, chunks), _name_direction(work), start_s, end_s, _describe(work, chunks)
        )
        now_s = end_s
    passes_end_s = clock.slowdown * (clock.gather_s + clock.pipeline_s)
    data = costs.data_parallel
    rest = [
        (WAIT, "bubble_s", passes_end_s - now_s),
        ("reduce gradients", "data_parallel_s", clock.slowdown * data.exposed_reduce_s),
        ("sum tied embeddings", "data_parallel_s", clock.slowdown * data.embedding_s),
        ("optimizer", "optimizer_s", clock.slowdown * costs.optimizer_s),
        ("host, once per step", "overhead_s", clock.slowdown * costs.step_s),
        ("jitter of all nodes", "jitter_s", clock.step.jitter_s),
    ]
    for position, (name, category, seconds) in enumerate(rest):
        # The sum of the parts above equals the step time up to rounding, which the last span takes.
        is_last = position == len(rest) - 1
        end_s = clock.step.total_s if is_last else min(now_s + max(0.0, seconds), clock.step.total_s)
        yield Span(rank, STEP_TRACK, name, category, now_s, end_s, {})
        now_s = end_s


def _draw_parts(rank: int, works: Sequence[PlacedPass], chunks: Sequence[StageChunk], clock: _Clock) -> Iterator[Span]:
    for work, start_s, end_s in works:
        parts = select_parts(chunks, work)
        now_s, whole_s = start_s, sum(parts.values())
        for name, seconds in parts.items():
            next_s = now_s + (end_s - start_s) * seconds / whole_s if whole_s else now_s
            yield Span(rank, PARTS_TRACK, PART_NAMES[name], name, clock.tell(now_s), clock.tell(next_s), {})
            now_s = next_s


def _draw_beside(rank: int, works: Sequence[PlacedPass], costs: StepCosts, clock: _Clock) -> Iterator[Span]:
    """Parameters beside the first forward pass, gradients up to the end of the last backward pass."""
    data = costs.data_parallel
    start_s, end_s = clock.tell(0.0), clock.tell(works[-1].end_s)
    hidden_gather_s, hidden_reduce_s = clock.slowdown * data.hidden_gather_s, clock.slowdown * data.hidden_reduce_s
    yield Span(rank, GATHER_TRACK, "gather parameters", "hidden", start_s, start_s + hidden_gather_s, {})
    yield Span(rank, REDUCE_TRACK, "reduce gradients", "hidden", max(start_s, end_s - hidden_reduce_s), end_s, {})


class _Hidden(NamedTuple):
    """Communication beside every pass: its track, and seconds of one layer, forward and backward."""

    track: int
    name: str
    layer_s: tuple[float, float]


def _list_hidden(plan: Plan, costs: StepCosts, coefficients: Coefficients) -> list[_Hidden]:
    layer = costs.layer
    hidden = [
        _Hidden(
            TENSOR_TRACK,
            "TP communication",
            estimate_hidden_tensor_s(layer, plan.overlaps_tensor_parallel, coefficients),
        )
    ]
    if plan.sharding == "fsdp":
        seconds = estimate_hidden_fsdp_s(plan, layer.forward_s, layer.backward_s, coefficients)
        hidden.append(_Hidden(FSDP_TRACK, "FSDP communication", seconds))
    return hidden


def _draw_beside_passes(
    rank: int, works: Sequence[PlacedPass], chunks: Sequence[StageChunk], clock: _Clock, hidden: _Hidden
) -> Iterator[Span]:
    for work, start_s, end_s in works:
        seconds = len(chunks[work.chunk].layers) * hidden.layer_s[0 if work.is_forward else 1]
        if seconds > 0:
            end_s = min(end_s, start_s + seconds)
            yield Span(rank, hidden.track, hidden.name, "hidden", clock.tell(start_s), clock.tell(end_s), {})


def _name_direction(work: Pass) -> str:
    return "forward" if work.is_forward else "backward"


def _name_pass(work: Pass, chunks: Sequence[StageChunk]) -> str:
    chunk = f" chunk {work.chunk}" if len(chunks) > 1 else ""
    return f"{_name_direction(work)} {work.microbatch}{chunk}"


def _describe(work: Pass, chunks: Sequence[StageChunk]) -> dict[str, Any]:
    layers = chunks[work.chunk].layers
    return {
        "microbatch": work.microbatch,
        "chunk": work.chunk,
        "first_layer": layers[0] if layers else None,
        "num_layers": len(layers),
    }


def sum_slowest_stage(trace: StepTrace) -> dict[str, float]:
    """Seconds of the stage that sets the pace by kind of span; they add up to the step time."""
    sums: dict[str, float] = {}
    for span in trace.spans:
        if (span.pp_rank, span.track) == (trace.slowest_pp_rank, STEP_TRACK):
            name = span.category if span.category in ("forward", "backward") else span.name
            sums[name] = sums.get(name, 0.0) + span.end_s - span.start_s
    return sums


# --- the file --------------------------------------------------------------------------------------------------------


def format_trace(trace: StepTrace) -> str:
    """The trace as JSON, in Chrome's "Trace Event Format": complete events ("X") with times in microseconds.

    Times are whole nanoseconds, so that spans that touch still do after rounding.
    """
    events = [*_list_names(trace), *(_build_event(span) for span in trace.spans)]
    plan = trace.plan
    document = {
        "displayTimeUnit": "ms",
        "otherData": {
            "format": FORMAT,
            "what": "a predicted step, not a measured one",
            "model": plan.model.name,
            "gpu": plan.gpu.name,
            "cluster": plan.cluster.name,
            "num_gpus": plan.layout.world_size,
            "layout": describe_plan(plan),
            "step_time_s": trace.step.total_s,
            "low_s": trace.step.low_s,
            "high_s": trace.step.high_s,
            "slowest_pp_rank": trace.slowest_pp_rank,
            "pass_ratio": trace.pass_ratio,
        },
        # Spans of no length (a part that this layout does not have) would only fill the file.
        "traceEvents": [event for event in events if event.get("dur") != 0.0],
    }
    return json.dumps(document, allow_nan=False, separators=(",", ":")).replace('{"ph"', '\n{"ph"') + "\n"


def _list_names(trace: StepTrace) -> Iterator[dict[str, Any]]:
    """Metadata events ("M"), which name processes and tracks."""
    model = trace.plan.model
    split = list_chunk_layers(model.num_layers, trace.plan.layout, model.num_mtp_layers)
    tracks = sorted({(span.pp_rank, span.track) for span in trace.spans if span.end_s > span.start_s})
    for rank, chunks in enumerate(split):
        pace = ", sets the pace" if rank == trace.slowest_pp_rank and len(split) > 1 else ""
        num_layers = sum(map(len, chunks))
        name = f"pipeline stage {rank} ({num_layers} layers{pace})"
        yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    for rank, track in tracks:
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": TRACK_NAMES[track]}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": track, "args": {"sort_index": track}}


def _build_event(span: Span) -> dict[str, Any]:
    start_ns, end_ns = round(1e9 * span.start_s), round(1e9 * span.end_s)
    event = {
        "ph": "X",
        "pid": span.pp_rank,
        "tid": span.track,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "name": span.name,
        "cat": span.category,
    }
    return event | ({"args": dict(span.details)} if span.details else {})
