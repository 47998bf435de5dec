"""No published run is out of memory; blanks take the least measure with which a plan fits; stated cells stay."""

import dataclasses

import pytest

from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage, fits_in_memory
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.row_memory import fill_memory_options, fit_in_memory
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH, PUBLISHED_RUNS_PATH, RunRow
from megatron_hammer.scaling.published.software import load_known_software, select_recipe, select_software
from tests.helpers.toy_study import build_llama_plan

PLAN = build_llama_plan(global_batch_size=64, gradient_bytes=2)
BRIDGE, UNKNOWN = RunRow(row_number=2, source="MegatronBridge_perf_25.11"), RunRow(row_number=2)


def fit(plan=PLAN, **cells):
    assumptions: list[str] = []
    return fit_in_memory(plan, dataclasses.replace(UNKNOWN, **cells), assumptions), assumptions


@pytest.mark.parametrize("path", [PUBLISHED_RUNS_PATH, PUBLISHED_MOE_PATH], ids=["dense", "experts"])
def test_no_published_run_is_refused_for_memory(path):
    runs, _ = read_runs(path)
    too_large = [
        f"{run.row_number} {run.source} {run.model}: {estimate_heaviest_plan_stage(run.plan).list_parts()}"
        for run in runs
        if not fits_in_memory(run.plan)
    ]
    assert too_large == []


def test_published_runs_would_be_refused_without_what_their_recipes_save():
    runs, _ = read_runs(PUBLISHED_RUNS_PATH)
    plain = {"has_quantized_parameters": False, "num_offloaded_layers": 0, "recompute_num_layers": None}
    refused = [run for run in runs if not fits_in_memory(dataclasses.replace(run.plan, **plain))]
    assert len(refused) > 20


def test_a_plan_that_fits_stays_as_it_is():
    plan, assumptions = fit(dataclasses.replace(PLAN, recompute="full"))
    assert plan.recompute_num_layers is None
    assert assumptions == []


def test_a_blank_recomputation_is_that_of_the_fewest_layers():
    assert not fits_in_memory(PLAN)
    plan, (assumption,) = fit(micro_batch=1)
    assert (plan.recompute, plan.micro_batch_size) == ("full", 1)
    assert 0 < plan.recompute_num_layers < PLAN.model.num_layers
    assert fits_in_memory(plan)
    assert not fits_in_memory(dataclasses.replace(plan, recompute_num_layers=plan.recompute_num_layers - 1))
    assert f"recompute full of {plan.recompute_num_layers} of up to 32 layers" in assumption
    selective, _ = fit(dataclasses.replace(PLAN, recompute="selective"), micro_batch=1, recompute="selective")
    assert selective == plan  # of what, the row does not say


def test_a_blank_micro_batch_is_halved_before_anything_is_recomputed():
    large = dataclasses.replace(PLAN, micro_batch_size=4, seq_length=2048, global_batch_size=128)
    plan, (assumption,) = fit(large)
    assert (plan.recompute, plan.micro_batch_size) == ("none", 2)
    assert assumption.startswith("micro_batch 2: blank")
    stated, _ = fit(large, micro_batch=4)
    assert (stated.recompute, stated.micro_batch_size) == ("full", 4)


def test_stated_cells_stay_and_contradict_each_other_only_where_nothing_else_can_be_wrong():
    cells = {"micro_batch": 1, "recompute": "none"}
    plan, assumptions = fit(**cells)
    assert (plan, assumptions) == (PLAN, [])  # validation flags it
    with pytest.raises(UnpredictableError, match="micro-batches of 8 with recompute none keep"):
        fit(dataclasses.replace(PLAN, micro_batch_size=8), **cells)


def test_eight_bit_parameters_are_those_of_the_source():
    software, _ = select_software(BRIDGE, "h100-sxm")

    def is_quantized(precision, cell="fp8", **changes):
        plan = dataclasses.replace(PLAN, precision=precision, **changes)
        row = dataclasses.replace(BRIDGE, precision=cell)
        return fill_memory_options(plan, row, None, software, []).has_quantized_parameters

    assert is_quantized("fp8", "FP8-CS")
    assert is_quantized("mxfp8", "FP8-MX")
    assert not is_quantized("bf16", "BF16")
    assert not is_quantized("nvfp4", "NVFP4")
    assert not is_quantized("fp8", "FP8-SC")  # scales of blocks: the recipe gathers 16-bit weights
    assert not is_quantized("fp8", sharding="none")


def test_layers_of_a_recipe_are_offloaded_under_fsdp():
    software, _ = select_software(BRIDGE, "gb200")
    row = dataclasses.replace(BRIDGE, model="llama3-70b", precision="FP8-CS")
    recipe = select_recipe(row, "gb200")
    assert recipe.num_offloaded_layers == 40
    assert select_recipe(dataclasses.replace(row, precision="BF16"), "gb200").num_offloaded_layers == 20
    assert select_recipe(dataclasses.replace(row, precision="NVFP4"), "gb200") is None
    assumptions: list[str] = []
    plan = fill_memory_options(dataclasses.replace(PLAN, sharding="fsdp"), row, recipe, software, assumptions)
    assert plan.num_offloaded_layers == 40
    assert any("activations of 40 layers on the host" in text for text in assumptions)
    assert fill_memory_options(PLAN, row, recipe, software, []).num_offloaded_layers == 0


def test_every_source_has_its_modules_of_selective_recomputation():
    modules = {one.name: one.selective_modules for one in load_known_software().software}
    assert modules["torchtitan"] == ("every_other_matmul",)
    assert modules["Megatron Bridge"] == ("core_attn",)


def test_weights_that_exceed_the_gpu_are_sharded():
    software, _ = select_software(UNKNOWN, "h100-sxm")
    model = dataclasses.replace(PLAN.model, num_layers=80)  # 18 billion parameters of 2 + 2 bytes and a shard of 12
    assumptions: list[str] = []
    plan = fill_memory_options(dataclasses.replace(PLAN, model=model), UNKNOWN, None, software, assumptions)
    assert (plan.sharding, plan.layout.has_distributed_optimizer) == ("fsdp", False)
    assert any("sharding fsdp: weights, gradients and buffers" in text for text in assumptions)
    # With twice the memory they stay whole.
    large = dataclasses.replace(PLAN.gpu, memory_bytes=2 * PLAN.gpu.memory_bytes)
    kept = fill_memory_options(dataclasses.replace(PLAN, model=model, gpu=large), UNKNOWN, None, software, [])
    assert kept.sharding == "distributed_optimizer"
