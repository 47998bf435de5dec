"""Launch scripts: their contents for a plan, and plans that are refused."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.launch.launch_scripts import (
    SUFFIXES,
    KubernetesOptions,
    Launch,
    build_launch,
    build_schedule,
    list_environment,
    list_launch_flags,
    render,
    select_backend,
)
from megatron_hammer.scaling.plan import Plan


def build(preset: str = "llama3-8b", *, gpu: str = "h100-sxm", cluster: str = "dgx-h100", **changes: Any) -> Launch:
    """A launch of a preset on 16 GPUs (TP4 PP2 DP2) unless the layout says otherwise."""
    layout = changes.pop("layout", {})
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "data_parallel_size": 2}
    plan = Plan(
        model=changes.pop("model", PRESETS[preset].model),
        layout=ParallelLayout(**{**sizes, "has_sequence_parallel": True, **layout}),
        gpu=select_gpu(gpu),
        cluster=select_cluster(cluster),
        **{"seq_length": 8192, "micro_batch_size": 1, "global_batch_size": 64, **changes},
    )
    return build_launch(
        plan,
        model_arguments=build_model_arguments(plan.model),
        name=f"{plan.model.name}-16-1",
        train_tokens=None,
        comment="a row",
    )


def value_of(flags: list[str], flag: str) -> str:
    return flags[flags.index(flag) + 1]


def test_flags_of_a_plan() -> None:
    flags = list_launch_flags(build(recompute="full"))
    assert flags[:4] == ["--preset", "llama3-8b", "--platform", "cuda"]
    assert value_of(flags, "--tensor-model-parallel-size") == "4"
    assert value_of(flags, "--pipeline-model-parallel-size") == "2"
    assert (value_of(flags, "--global-batch-size"), value_of(flags, "--seq-length")) == ("64", "8192")
    assert value_of(flags, "--recompute-method") == "uniform"
    assert {"--sequence-parallel", "--overlap-grad-reduce", "--overlap-param-gather"} <= set(flags)
    assert "--no-distributed-optimizer" not in flags


def test_fsdp_has_its_checkpoints_and_connections() -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "data_parallel_size": 8}
    launch = build(sharding="fsdp", layout=layout)
    flags = list_launch_flags(launch)
    assert "--use-megatron-fsdp" in flags
    assert value_of(flags, "--ckpt-format") == "fsdp_dtensor"
    assert list_environment(launch)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert list_environment(build())["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in list_environment(build(gpu="b200-sxm", cluster="dgx-b200"))


def test_backend_follows_what_only_transformer_engine_does() -> None:
    assert select_backend(build().plan) == "auto"
    assert select_backend(build(precision="fp8").plan) == "te"
    assert select_backend(build(layout={"context_parallel_size": 2, "data_parallel_size": 1}).plan) == "te"
    assert value_of(list_launch_flags(build(precision="fp8")), "--fp8-format") == "hybrid"


def test_shards_smaller_than_the_data_ranks() -> None:
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 16}
    assert (
        value_of(list_launch_flags(build(layout=layout, shard_size=8)), "--num-distributed-optimizer-instances") == "2"
    )
    assert "--num-distributed-optimizer-instances" not in list_launch_flags(build(layout=layout, shard_size=16))
    assert "--grad-reduce-in-bf16" in list_launch_flags(build(layout=layout, gradient_bytes=2))


def test_cpu_processes_have_no_overlap() -> None:
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "has_sequence_parallel": False}
    launch = build("hammer-tiny", gpu="cpu-core", cluster="cpu-host", layout=layout, seq_length=256, precision="fp32")
    flags = list_launch_flags(launch)
    assert value_of(flags, "--platform") == "cpu"
    assert not any(flag.startswith("--overlap") for flag in flags)
    assert "nvidia.com/gpu" not in render(launch, "kubernetes")
    assert "--gpus-per-node" not in render(launch, "slurm")


def test_schedule_keeps_the_recipes_tokens() -> None:
    launch = build("hammer-1b4", seq_length=2048, global_batch_size=512)
    recipe = PRESETS["hammer-1b4"].recipe
    halves = recipe.tokens_per_step // (512 * 2048)
    assert halves == 2
    schedule = build_schedule(launch)
    assert int(schedule["TRAIN_ITERS"]) == -(-recipe.train_tokens // (512 * 2048))
    assert int(schedule["LR_WARMUP_ITERS"]) == 2 * recipe.lr_warmup_steps
    short = replace(launch, train_tokens=10 * 512 * 2048)
    assert build_schedule(short) == {"TRAIN_ITERS": "10", "LR_WARMUP_ITERS": "5"}


def test_a_model_without_a_preset_is_spelled_out() -> None:
    model = replace(PRESETS["llama3-8b"].model, name="mine", num_query_groups=4)
    launch = build(model=model)
    flags = list_launch_flags(launch)
    assert "--preset" not in flags
    assert (value_of(flags, "--num-layers"), value_of(flags, "--num-query-groups")) == ("32", "4")
    assert {"--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"} <= set(flags)
    assert set(build_schedule(launch)) == {"LR", "MIN_LR", "LR_WARMUP_ITERS", "TRAIN_ITERS"}


def test_a_spelled_model_has_only_flags_that_megatron_heeds() -> None:
    """Arguments that are at their default, or ignored beside others, have no flag."""
    old = replace(
        PRESETS["gpt2-124m"].model, name="old", activation="gelu_erf", norm_epsilon=1e-6, init_method_std=0.0061234
    )
    flags = list_launch_flags(build(model=old))
    assert {"--no-bias-gelu-fusion"} <= set(flags)
    unexpected = {"--num-query-groups", "--rotary-base", "--add-qkv-bias", "--disable-bias-linear", "--swiglu"}
    assert not unexpected & set(flags)
    assert (value_of(flags, "--norm-epsilon"), value_of(flags, "--init-method-std")) == ("1e-06", "0.0061234")
    moe = replace(PRESETS["hammer-tiny-moe"].model, name="experts", num_layers=8)
    flags = list_launch_flags(build(model=moe))
    expected = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "352"]
    expected += ["--moe-aux-loss-coeff", "0.01", "--moe-token-dispatcher-type", "alltoall"]
    expected += ["--moe-shared-expert-intermediate-size", "704", "--moe-shared-expert-gate", "--moe-router-pre-softmax"]
    start = flags.index("--num-experts")
    assert flags[start : start + len(expected)] == expected


def test_a_recipes_sequence_parallelism_cannot_be_taken_back() -> None:
    name = next(name for name, preset in PRESETS.items() if preset.recipe.has_sequence_parallel)
    match = f"sequence-parallel: must be on where the preset's recipe has it, got preset={name}, tp=4"
    with pytest.raises(ConfigError, match=match):
        list_launch_flags(build(name, layout={"has_sequence_parallel": False}))


def test_a_world_fills_its_nodes() -> None:
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3, "data_parallel_size": 1}
    match = r"gpus: must fill whole nodes, got 12 GPUs on nodes of 8 \(dgx-h100\). Choose a row of 8 GPUs."
    with pytest.raises(ConfigError, match=match):
        build(layout=layout)
    launch = build(layout={"data_parallel_size": 1, "pipeline_model_parallel_size": 1})
    assert (launch.num_nodes, launch.processes_per_node) == (1, 4)


@pytest.mark.parametrize("launcher", SUFFIXES)
def test_scripts_name_their_nodes(launcher: Any) -> None:
    text = render(build(), launcher)
    assert "llama3-8b-16-1" in text
    assert "    --tensor-model-parallel-size 4" in text
    assert text.endswith("\n")
    if launcher == "slurm":
        assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8"} <= set(text.splitlines())
    if launcher != "kubernetes":
        assert "set -euo pipefail" in text.splitlines()


def test_kubernetes_manifest() -> None:
    options = KubernetesOptions(image="registry/hammer:1", volume_claim="disk")
    service, config, job = yaml.safe_load_all(render(build(), "kubernetes", options))
    assert [document["kind"] for document in (service, config, job)] == ["Service", "ConfigMap", "Job"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 2, 2)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry/hammer:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["MASTER_ADDR"] == "llama3-8b-16-1-0.llama3-8b-16-1"
    assert pod["subdomain"] == service["metadata"]["name"]
    # The pods run the very script of torchrun.
    assert config["data"]["launch.sh"].strip() == render(build(), "torchrun").strip()
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [{"claimName": "disk"}]
