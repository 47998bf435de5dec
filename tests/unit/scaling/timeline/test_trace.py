"""The timeline of a predicted step: as long as predicted, whole, without overlaps, and in an order that is possible."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.cost.coefficients import load_coefficients, replace_values
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.timeline.trace import (
    FSDP_TRACK,
    GATHER_TRACK,
    PARTS_TRACK,
    REDUCE_TRACK,
    STEP_TRACK,
    TENSOR_TRACK,
    StepTrace,
    build_trace,
    format_trace,
    sum_slowest_stage,
)


def build_plan(preset: str = "llama3-8b", *, num_microbatches: int = 8, **changes: Any) -> Plan:
    plan = Plan(
        model=select_preset(preset).model,
        layout=ParallelLayout(data_parallel_size=16, tensor_model_parallel_size=2, has_sequence_parallel=True),
        gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"),
        seq_length=4096,
        micro_batch_size=1,
        global_batch_size=1,
    )
    plan = replace(plan, **{name: value for name, value in changes.items() if name != "layout"})
    plan = replace(plan, layout=replace(plan.layout, **changes.get("layout", {})))
    return replace(plan, global_batch_size=num_microbatches * plan.layout.data_parallel_size)


MOE = select_preset("qwen3-30b-a3b").model.moe
assert MOE is not None
PLANS = {
    "no pipeline": build_plan(),
    "1F1B": build_plan(layout={"pipeline_model_parallel_size": 4}),
    "fewer micro-batches than stages": build_plan(num_microbatches=2, layout={"pipeline_model_parallel_size": 4}),
    "interleaved": build_plan(
        layout={"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}, recompute="full"
    ),
    "an uneven split": build_plan(
        layout={"pipeline_model_parallel_size": 4, "num_layers_first_stage": 9, "num_layers_last_stage": 5},
    ),
    "context parallelism": build_plan(
        num_microbatches=3, seq_length=32768, layout={"context_parallel_size": 4, "pipeline_model_parallel_size": 2}
    ),
    "experts": build_plan(
        "qwen3-30b-a3b",
        layout={"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 2},
        recompute="selective",
    ),
    "dense layers among mixtures, and a layer for further tokens": build_plan(
        model=replace(
            select_preset("qwen3-30b-a3b").model,
            moe=replace(MOE, dense_layers=(0, 1, 2)),
            ffn_hidden_size=9728,
            num_mtp_layers=1,
        ),
        layout={"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
    ),
    "FSDP": build_plan(sharding="fsdp", overlaps_tensor_parallel=True),
    "tied embeddings without overlap": build_plan(
        "qwen3-0.6b", overlaps_grad_reduce=False, layout={"pipeline_model_parallel_size": 4}
    ),
    "processes that share cores": build_plan(
        "hammer-tiny",
        gpu=select_gpu("cpu-core"),
        cluster=select_cluster("cpu-host"),
        layout={"data_parallel_size": 4, "pipeline_model_parallel_size": 2},
    ),
}


@pytest.fixture(scope="module", params=PLANS)
def trace(request: pytest.FixtureRequest) -> StepTrace:
    return build_trace(PLANS[request.param], load_coefficients())


def list_events(trace: StepTrace) -> list[dict[str, Any]]:
    """Complete events with their times in whole nanoseconds."""
    events = [event for event in json.loads(format_trace(trace))["traceEvents"] if event["ph"] == "X"]
    return [event | {"ts": round(1000 * event["ts"]), "dur": round(1000 * event["dur"])} for event in events]


def test_every_stage_is_as_long_as_the_step_without_a_gap(trace: StepTrace) -> None:
    tracks = defaultdict(list)
    for event in list_events(trace):
        tracks[event["pid"], event["tid"]].append(event)
    for (_, track), events in tracks.items():
        events.sort(key=lambda event: event["ts"])
        ends = [event["ts"] + event["dur"] for event in events]
        # On each track, a span begins no earlier than the one before it ends.
        assert all(event["ts"] + event["dur"] <= later["ts"] for event, later in pairwise(events))
        assert ends[-1] <= round(1e9 * trace.step.total_s)
        if track == STEP_TRACK:
            assert events[0]["ts"] == 0
            assert [event["ts"] for event in events[1:]] == ends[:-1]
            assert sum(event["dur"] for event in events) == round(1e9 * trace.step.total_s)
    num_stages = trace.plan.layout.pipeline_model_parallel_size
    assert sorted(pid for pid, track in tracks if track == STEP_TRACK) == list(range(num_stages))


def index_passes(trace: StepTrace) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    passes = [event for event in list_events(trace) if event["cat"] in ("forward", "backward")]
    indexed = {
        (event["cat"], event["pid"], event["args"]["chunk"], event["args"]["microbatch"]): event for event in passes
    }
    assert len(indexed) == len(passes)
    return indexed


def test_every_micro_batch_passes_every_layer_in_order(trace: StepTrace) -> None:
    passes = index_passes(trace)
    num_layers = trace.plan.model.num_layers + trace.plan.model.num_mtp_layers
    for microbatch in range(trace.plan.num_microbatches):
        ways = {
            direction: sorted(
                (event for key, event in passes.items() if (key[0], key[3]) == (direction, microbatch)),
                key=lambda event: event["ts"],
            )
            for direction in ("forward", "backward")
        }
        order = [(event["args"]["chunk"], event["pid"]) for event in ways["forward"]]
        layout = trace.plan.layout
        assert order == [
            (chunk, rank)
            for chunk in range(layout.virtual_pipeline_model_parallel_size)
            for rank in range(layout.pipeline_model_parallel_size)
        ]
        assert [(event["args"]["chunk"], event["pid"]) for event in ways["backward"]] == order[::-1]
        way = ways["forward"] + ways["backward"]
        assert all(event["ts"] + event["dur"] <= later["ts"] for event, later in pairwise(way))
        assert sum(event["args"]["num_layers"] for event in ways["forward"]) == num_layers


def test_the_parts_are_those_of_the_prediction(trace: StepTrace) -> None:
    own = [span for span in trace.spans if span.pp_rank == trace.slowest_pp_rank]
    sums: dict[str, float] = defaultdict(float)
    for span in own:
        if span.track == PARTS_TRACK:
            sums[span.category] += (span.end_s - span.start_s) / trace.pass_ratio
        elif span.track == STEP_TRACK and span.category not in ("forward", "backward"):
            sums[span.category] += span.end_s - span.start_s
    assert trace.pass_ratio > 0.99
    step, tolerance_s = trace.step, 1e-9 + (1 - trace.pass_ratio) * trace.step.total_s
    # The sends of the filling pipeline are waits; those of each micro-batch are parts of its passes.
    waits_s = sums.pop("bubble_s", 0.0) + sums.pop("pipeline_p2p_s", 0.0)
    assert waits_s == pytest.approx(step.bubble_s + step.pipeline_p2p_s, abs=tolerance_s)
    for name, seconds in sums.items():
        assert seconds == pytest.approx(getattr(step, name), rel=1e-9), name
    assert sum(sums.values()) + waits_s == pytest.approx(step.total_s, abs=tolerance_s)
    assert sum(sum_slowest_stage(trace).values()) == pytest.approx(step.total_s, rel=1e-12)


def test_the_parts_of_the_layout_are_there() -> None:
    def list_categories(name: str) -> set[str]:
        trace = build_trace(PLANS[name], load_coefficients())
        return {event["cat"] for event in list_events(trace)}

    assert "expert_parallel_s" in list_categories("experts")
    assert "context_parallel_s" in list_categories("context parallelism")
    assert not {"expert_parallel_s", "context_parallel_s", "pipeline_p2p_s"} & list_categories("no pipeline")


def test_hidden_communication_lies_beside_the_passes_that_hide_it() -> None:
    trace = build_trace(PLANS["1F1B"], load_coefficients())
    passes = index_passes(trace)
    hidden = {event["tid"]: event for event in list_events(trace) if event["cat"] == "hidden" and event["pid"] == 0}
    assert hidden[GATHER_TRACK]["ts"] == passes["forward", 0, 0, 0]["ts"]
    last = passes["backward", 0, 0, 7]
    assert hidden[REDUCE_TRACK]["ts"] + hidden[REDUCE_TRACK]["dur"] == last["ts"] + last["dur"]


def test_communication_beside_a_pass_is_all_the_traffic_but_what_shows() -> None:
    plan, coefficients = PLANS["FSDP"], load_coefficients()
    trace = build_trace(plan, coefficients)
    sums: dict[tuple[int, str], float] = defaultdict(float)
    for span in trace.spans:
        sums[span.track, span.category] += span.end_s - span.start_s
    alone = replace(plan, overlaps_tensor_parallel=False)
    shown_s, all_s = (build_trace(one, coefficients).step.tensor_parallel_s for one in (plan, alone))
    assert sums[TENSOR_TRACK, "hidden"] == pytest.approx(all_s - shown_s)
    # With all of it exposed, nothing is beside the layers, and the step shows what was there before.
    exposed = build_trace(plan, replace_values(coefficients, {"fsdp_exposed_ratio": 1.0}))
    assert not any(span.track == FSDP_TRACK for span in exposed.spans)
    shown_s = trace.step.data_parallel_s
    assert sums[FSDP_TRACK, "hidden"] == pytest.approx(exposed.step.data_parallel_s - shown_s)


def test_a_step_of_too_many_spans_is_refused() -> None:
    plan = build_plan(num_microbatches=20_000, layout={"pipeline_model_parallel_size": 4})
    with pytest.raises(ConfigError, match=r"row: .*at most about 1,000,000 spans, got 160,000 passes.*--detail passes"):
        build_trace(plan, load_coefficients())
