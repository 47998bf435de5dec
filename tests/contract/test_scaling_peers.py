"""benchmarks/scaling_peers.py describes a run to Calculon with the same FLOPs, and names what it cannot express."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_hammer.model.accounting import count_flops_per_token
from tests.helpers.repository import ROOT
from tests.helpers.run_tables import read_plan

sys.path.insert(0, str(ROOT / "benchmarks"))

from scaling_peers import Comparison, RefusedError, build_table, describe_application, describe_execution, predict


@pytest.mark.parametrize("cells", [{}, {"ffn": "5632"}], ids=["gelu", "swiglu"])
def test_the_width_of_the_feed_forward_network_carries_all_flops(tmp_path: Path, cells: dict[str, str]) -> None:
    plan = read_plan(tmp_path, **cells)
    model = describe_application(plan)
    attention = 4 * model["hidden"] * model["attn_heads"] * model["attn_size"]
    weights = model["num_blocks"] * (attention + 2 * model["hidden"] * model["feedforward"])
    scores = 12 * model["num_blocks"] * model["hidden"] * plan.seq_length
    # Its width is a multiple of the tensor-parallel size, which moves the FLOPs by less.
    assert 6 * weights + scores == pytest.approx(count_flops_per_token(plan.model, plan.seq_length, "B"), rel=1e-3)


def test_networks_and_schedule(tmp_path: Path) -> None:
    plan = read_plan(tmp_path, tp="2", pp="4", dp="2", vpp="3", recompute="selective")
    execution = describe_execution(plan, "float16")
    nets = [execution[f"{name}_par_net"] for name in ("tensor", "data", "pipeline")]
    assert nets == [0, 0, 1], "tensor and data ranks fill less than a node, the stages more"
    assert (execution["pipeline_interleaving"], execution["activation_recompute"]) == (3, "attn_only")
    assert execution["optimizer_sharding"]
    alone = replace(plan.layout, tensor_model_parallel_size=1, data_parallel_size=1)
    single = describe_execution(replace(plan, layout=alone), "float16")
    assert (single["tensor_par_overlap"], single["data_par_overlap"], single["optimizer_sharding"]) == (
        "none",
        False,
        False,
    )


@pytest.mark.parametrize(("cells", "reason"), [({"cp": "2", "dp": "4"}, "context"), ({"sharding": "FSDP"}, "FSDP")])
def test_runs_that_calculon_cannot_express(tmp_path: Path, cells: dict[str, str], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        predict(read_plan(tmp_path, **cells), ModuleType("unused"), tmp_path)


def test_only_runs_of_both_are_compared_and_the_others_counted() -> None:
    one = Comparison(row_number=2, source="a", model="b", gpu="h100-sxm", measured_s=1.0, ours_s=1.1, calculon_s=0.8)
    refused = replace(one, calculon_s=None, ours_s=9.0)
    rows = dict((name, cells) for name, *cells in build_table([one, refused, replace(one, gpu="a100-sxm-80gb")]))
    assert rows["h100-sxm"] == ["1", "1", "20.0%", "20.0%", "-20.0%", "10.0%", "10.0%", "+10.0%"]
    assert rows["both GPUs"][:2] == ["2", "1"]
