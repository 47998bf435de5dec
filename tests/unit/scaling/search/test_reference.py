"""The published run of a study's model that is closest to each size."""

from dataclasses import replace

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_default_cluster, select_gpu
from megatron_hammer.scaling.plan import TODAY, ExpertOptions
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.search.projection import Projection, Study
from megatron_hammer.scaling.search.reference import find_references, list_published_runs
from tests.helpers.toy_study import build_toy_study


def build_study(preset: str = "llama3-70b", gpu: str = "h100-sxm", **changes: object) -> Study:
    recipe = select_preset(preset).recipe
    fields = {
        "gpu": select_gpu(gpu),
        "cluster": select_default_cluster(gpu),
        "seq_length": recipe.seq_length,
        "global_batch_size": 512,
        "gpu_counts": (64, 1024),
    }
    return build_toy_study(preset, **(fields | changes))


def find(study: Study):
    return find_references(study, predict_step, estimate_heaviest_plan_stage)


def test_the_closest_run_of_the_same_model_and_gpu() -> None:
    small, large = find(build_study(precision="fp8"))
    for reference, num_gpus in ((small, 64), (large, 1024)):
        plan = reference.run.plan
        assert (reference.num_gpus, plan.layout.world_size, plan.precision) == (num_gpus, num_gpus, "fp8")
        assert (plan.model.num_layers, plan.gpu.name) == (80, "h100-sxm")
        assert "NVIDIA" in reference.run.source or "NeMo" in reference.run.source or "Bridge" in reference.run.source
        assert reference.step.total_s == predict_step(plan).total_s
        assert abs(reference.error_ratio) < 0.3


def test_the_same_precision_comes_before_the_same_size() -> None:
    (reference,) = find(build_study(precision="bf16", gpu_counts=(1024,)))
    assert reference.run.plan.precision == "bf16"
    (other,) = find(build_study(precision="fp16", gpu_counts=(1024,)))  # no such run is published
    assert other.run.plan.layout.world_size == 1024


def test_its_layout_is_projected_to_the_studys_size() -> None:
    (reference,) = find(build_study(gpu_counts=(2048,), global_batch_size=1024))
    own = reference.projection
    assert own is not None
    assert own.plan.layout.world_size == 2048
    assert own.plan.global_batch_size == 1024
    published = reference.run.plan.layout
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        assert getattr(own.plan.layout, name) == getattr(published, name)
    assert own.step.total_s == predict_step(own.plan).total_s


def test_its_layout_is_projected_with_the_software_and_the_options_of_the_study() -> None:
    """The comparison with the search's best is one of layouts, not of the year or the routing of the published run."""
    experts = ExpertOptions(imbalance_ratio=1.3)
    study = build_study("qwen3-30b-a3b", "gb200", gpu_counts=(64,), global_batch_size=512, experts=experts)
    old = [run for run in list_published_runs() if run.plan.software_year < TODAY and run.plan.gpu.name == "gb200"]
    (reference,) = find_references(study, predict_step, estimate_heaviest_plan_stage, old)
    published, own = reference.run.plan, reference.projection.plan
    assert published.has_quantized_parameters
    assert study.precision == "bf16"
    assert (own.software_year, own.experts.imbalance_ratio, own.cuda_graphs) == (TODAY, 1.3, "none")
    assert own.experts.dispatcher == published.experts.dispatcher
    assert not own.has_quantized_parameters
    assert own.keeps_quantized_copies
    (low,) = find_references(replace(study, precision="mxfp8"), predict_step, estimate_heaviest_plan_stage, old)
    assert low.projection.plan.has_quantized_parameters


def test_a_size_that_does_not_divide_has_the_run_only() -> None:
    (reference,) = find(build_study(gpu_counts=(63,)))
    assert reference.projection is None


def test_the_group_that_shards_is_that_of_the_size() -> None:
    (base,) = find(build_study(gpu_counts=(64,)))
    plan = replace(base.run.plan, layout=ParallelLayout(data_parallel_size=64), sharding="fsdp", shard_size=32)
    run = replace(base.run, plan=plan)

    def project(num_gpus: int) -> Projection | None:
        study = build_study(gpu_counts=(num_gpus,), global_batch_size=num_gpus)
        (reference,) = find_references(study, predict_step, estimate_heaviest_plan_stage, [run])
        return reference.projection

    assert project(128).plan.shard_size == 32
    assert project(32).plan.shard_size is None  # all ranks
    assert project(48) is None


def test_a_run_on_another_gpu_stands_in_where_there_is_none() -> None:
    (reference,) = find(build_study("qwen3-30b-a3b", gpu_counts=(512,), global_batch_size=1024))
    assert reference.run.plan.gpu.name != "h100-sxm"
    own = reference.projection
    assert own is not None
    assert (own.plan.gpu.name, own.plan.layout.world_size) == ("h100-sxm", 512)
    assert own.plan.layout.expert_model_parallel_size == reference.run.plan.layout.expert_model_parallel_size


def test_there_is_none_for_other_models() -> None:
    assert find(build_study("hammer-1b4")) == ()


def test_other_software_is_no_reference() -> None:
    study = build_study(gpu_counts=(64,))
    runs = [replace(run, is_megatron_style=False) for run in list_published_runs()]
    assert find_references(study, predict_step, estimate_heaviest_plan_stage, runs) == ()
    renamed = [replace(run, source=f"blog about {run.source}") for run in list_published_runs()]
    assert find_references(study, predict_step, estimate_heaviest_plan_stage, renamed) == ()
