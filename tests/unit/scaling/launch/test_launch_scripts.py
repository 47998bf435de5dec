"""Launch scripts: their contents for a plan, and plans that are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hammer.config.model_arguments import build_model_arguments, read_model
from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.shape import SlidingWindow, YarnScaling
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.launch.launch_scripts import (
    KUBERNETES_LAUNCHERS,
    SUFFIXES,
    KubernetesOptions,
    Launch,
    build_launch,
    build_schedule,
    list_environment,
    list_launch_flags,
    read_rdma,
    read_sweep,
    render,
    select_backend,
    shorten_name,
)
from megatron_hammer.scaling.launch.training_flags import list_model_flags
from megatron_hammer.scaling.plan import ExpertOptions, Plan
from megatron_hammer.scaling.plan_memory import build_memory_run
from tests.helpers.messages import raises_problem
from tests.helpers.parsed_flags import parse
from tests.helpers.repository import ROOT
from tests.helpers.shipped_launches import FILES, OPTIONS, build_shipped_launch, render_shipped


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


def read_values(launch: Launch) -> dict[str, str]:
    return {name: value for name, value, _ in list_environment(launch)}


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
    assert read_values(launch)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert read_values(build())["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in read_values(build(gpu="b200-sxm", cluster="dgx-b200"))


def test_backend_follows_what_only_transformer_engine_does() -> None:
    assert select_backend(build().plan) == "auto"
    assert select_backend(build(precision="fp8").plan) == "te"
    assert select_backend(build(layout={"context_parallel_size": 2, "data_parallel_size": 1}).plan) == "te"
    assert value_of(list_launch_flags(build(precision="fp8")), "--fp8-format") == "hybrid"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp8", "has_quantized_parameters": True},
        {"precision": "mxfp8", "has_quantized_parameters": True, "gpu": "b200-sxm", "cluster": "dgx-b200"},
        {"recompute": "full", "recompute_num_layers": 3},
        {"recompute": "selective", "recompute_modules": ("layernorm", "mlp")},
        {"offload_modules": ("core_attn", "attn_proj")},
        {"num_offloaded_layers": 5, "layout": {"pipeline_model_parallel_size": 1, "data_parallel_size": 4}},
        {"optimizer_offload_ratio": 0.5},
    ],
    ids=lambda changes: next(iter(changes.values())) if "precision" in changes else list(changes)[-1],
)  # fmt: skip
def test_preflight_counts_the_memory_that_the_plan_was_chosen_for(changes: dict[str, Any]) -> None:
    launch = build(**changes)
    flags = [*list_launch_flags(launch), "--mock-data", "--dry-run", "--world-size", str(launch.plan.layout.world_size)]
    memory = parse(*flags, platform="cuda", backend="te").plan.memory
    expected = build_memory_run(launch.plan)["options"]
    names = ("precision", "has_quantized_parameters", "recompute", "num_offloaded_layers",
             "offload_modules", "optimizer_offload_ratio", "moments_bytes", "master_bytes")  # fmt: skip
    assert {name: getattr(memory, name) for name in names} == {name: getattr(expected, name) for name in names}
    if launch.plan.recompute == "selective":
        assert memory.recompute_modules == launch.plan.recompute_modules
    if launch.plan.recompute == "full":
        assert (memory.recompute_method, memory.recompute_num_layers) == ("block", 3)


def test_offloading_has_what_megatron_asks_for() -> None:
    launch = build(offload_modules=("core_attn",))
    assert read_values(launch)["NVTE_CPU_OFFLOAD_V1"] == "1"
    assert select_backend(launch.plan) == "te"
    assert "NVTE_CPU_OFFLOAD_V1" not in read_values(build())


def test_shards_smaller_than_the_data_ranks() -> None:
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 16}
    assert (
        value_of(list_launch_flags(build(layout=layout, shard_size=8)), "--num-distributed-optimizer-instances") == "2"
    )
    assert "--num-distributed-optimizer-instances" not in list_launch_flags(build(layout=layout, shard_size=16))
    assert "--grad-reduce-in-bf16" in list_launch_flags(build(layout=layout, gradient_bytes=2))


def test_the_exchange_of_context_parallel_ranks() -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}
    layout["context_parallel_size"] = 8
    assert "--cp-comm-type" not in list_launch_flags(build(layout=layout))  # p2p
    flags = list_launch_flags(build(layout=layout, context_exchange="all_gather"))
    assert value_of(flags, "--cp-comm-type") == "all_gather"
    flags = list_launch_flags(build(layout=layout, context_exchange="a2a+p2p"))
    sizes = flags.index("--hierarchical-context-parallel-sizes")
    assert flags[sizes + 1 : sizes + 3] == ["4", "2"]  # four ranks in a node beside tp = 2, two nodes
    blockwise = list_launch_flags(build(precision="fp8_blockwise"))
    assert value_of(blockwise, "--fp8-recipe") == "blockwise"


def test_cpu_processes_have_no_overlap() -> None:
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "has_sequence_parallel": False}
    launch = build("hammer-tiny", gpu="cpu-core", cluster="cpu-host", layout=layout, seq_length=256, precision="fp32")
    flags = list_launch_flags(launch)
    assert value_of(flags, "--platform") == "cpu"
    assert not any(flag.startswith("--overlap") for flag in flags)
    assert set(read_values(launch)) == {"OMP_NUM_THREADS"}
    assert "nvidia.com/gpu" not in render(launch, "kubernetes", OPTIONS)
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


def test_every_number_of_yarn_and_of_windows_is_spelled() -> None:
    """The flags make the same model again."""
    yarn = YarnScaling(
        **{"factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 20.0, "beta_slow": 2.0},
        **{"mscale": 0.7, "mscale_all_dim": 0.3, "has_whole_bounds": False},
    )
    for scaling in (yarn, replace(yarn, has_whole_bounds=True)):
        for layers in ((0, 1, 2, 3), (0, 3)):
            window = SlidingWindow(num_tokens=128, layers=layers)
            model = replace(PRESETS["hammer-tiny"].model, name="mine", rope_scaling=scaling, sliding_window=window)
            flags = list_model_flags(model, build_model_arguments(model))
            assert read_model(parse(*flags, "--mock-data", "--dry-run").namespace) == model


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
    text = render(build(), launcher, sweep=["--lr 1e-4"])
    assert "llama3-8b-16-1" in text
    assert "    --tensor-model-parallel-size 4" in text
    assert text.endswith("\n")
    if launcher.startswith("slurm"):
        assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8"} <= set(text.splitlines())
    if launcher not in KUBERNETES_LAUNCHERS:
        assert "set -euo pipefail" in text.splitlines()


@pytest.mark.parametrize("launcher", SUFFIXES)
def test_every_variable_has_its_reason_and_can_be_overridden(launcher: Any) -> None:
    lines = [line.strip() for line in render(build(), launcher, sweep=["--lr 1e-4"]).splitlines()]
    for name, value, reason in list_environment(build()):
        place = lines.index(f'export {name}="${{{name}:-{value}}}"')
        assert lines[place - 1] == f"# {reason}"
    exported = {line.split("=")[0].split()[-1] for line in lines if line.startswith("export ")}
    libraries = {name for name in exported if name.startswith(("NCCL", "TORCH", "GLOO", "CUDA"))}
    assert libraries == {"NCCL_DEBUG", "CUDA_DEVICE_MAX_CONNECTIONS"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama3-8B-64-1", "llama3-8b-64-1"),
        ("7B_chat-64-1", "run-7b-chat-64-1"),
        ("模型", "run"),
        ("a-model-with-a-name-that-has-more-letters-than-512-12", "a-model-with-a-name-that-has-ers-than-512-12"),
        ("a-model-with-a-name-that-has-more-letters-than-512-13", "a-model-with-a-name-that-has-ers-than-512-13"),
    ],
)
def test_names_suit_kubernetes_and_stay_apart(name: str, expected: str) -> None:
    assert shorten_name(name) == expected
    assert len(f"{expected}-node-0-1234-abcde") <= 63, "JobSet refuses longer names of pods"


@pytest.mark.parametrize("launcher", SUFFIXES)
def test_the_name_of_a_model_cannot_leave_its_comment(launcher: Any) -> None:
    """It comes from a folder of the user, and so may have any character."""
    plan = build().plan
    name = "m\nrm -rf x\r\x07\x1b\u2028\udce9: {{ x }} '模型"
    arguments = build_model_arguments(plan.model)
    launch = build_launch(plan, model_arguments=arguments, name=name, train_tokens=None, comment=name)
    text = render(launch, launcher, sweep=["--lr 1e-4"])
    assert "# m rm -rf x : {{ x }} '模型\n" in text
    text.encode()
    if launcher in KUBERNETES_LAUNCHERS:
        assert all(document["metadata"]["name"] == "m-rm-rf-x-x" for document in yaml.safe_load_all(text))


@pytest.mark.parametrize("name", FILES)
def test_the_examples_are_rendered(name: str) -> None:
    """Run python -m tests.helpers.shipped_launches after a change of the templates."""
    assert (ROOT / name).read_text(encoding="utf-8") == render_shipped(name)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def read_manifest(launcher: Any, options: KubernetesOptions | None = None) -> dict[str, dict[str, Any]]:
    """The objects of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(render(build(), launcher, options))}


def find_job_spec(launcher: Any, options: KubernetesOptions | None = None) -> dict[str, Any]:
    objects = read_manifest(launcher, options)
    if launcher == "kubernetes":
        return objects["Job"]["spec"]
    job_set = (
        objects["JobSet"]["spec"] if launcher == "jobset" else objects["TrainingRuntime"]["spec"]["template"]["spec"]
    )
    (replicated,) = job_set["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("node", 1)
    return replicated["template"]["spec"]


def list_lost(read: Any, document: Any, path: str = "") -> list[str]:
    """Fields of the document that the model of its API does not know, and so lost; empty ones apart."""
    if isinstance(document, dict):
        rows = [(f"{path}.{key}", read.get(key), value) for key, value in document.items()]
    elif isinstance(document, list) and len(read or ()) == len(document):
        rows = [(f"{path}[{place}]", *pair) for place, pair in enumerate(zip(read or (), document, strict=True))]
    else:
        return [] if read == document or document in ([], "") else [path]
    return [
        lost for name, got, value in rows for lost in ([name] if got is None and value else list_lost(got, value, name))
    ]


@pytest.mark.parametrize("launcher", KUBERNETES_LAUNCHERS)
def test_manifests_have_the_fields_of_their_apis(launcher: Any) -> None:
    """The models that Kubeflow publishes of its API, of JobSet's and of Kubernetes'."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="bash tests/run.sh installs it")
    kinds = {
        "Job": models.IoK8sApiBatchV1JobSpec,
        "JobSet": models.JobsetV1alpha2JobSetSpec,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntimeSpec,
        "TrainJob": models.TrainerV1alpha1TrainJobSpec,
    }
    specs = {kind: document["spec"] for kind, document in read_manifest(launcher, OPTIONS).items() if kind in kinds}
    assert len(specs) == (2 if launcher == "trainjob" else 1)
    for kind, spec in specs.items():
        assert list_lost(kinds[kind].from_dict(spec).to_dict(), spec) == []
    if launcher == "jobset":
        pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        pod["containers"][0]["imagePolicy"] = "Always"
        lost = list_lost(kinds[kind].from_dict(spec).to_dict(), spec)
        assert lost == [".replicatedJobs[0].template.spec.template.spec.containers[0].imagePolicy"]


def test_indexed_job() -> None:
    objects = read_manifest("kubernetes", KubernetesOptions(image="registry/hammer:1", volume_claim="disk"))
    assert list(objects) == ["Service", "ConfigMap", "Job"]
    service, job = objects["Service"], objects["Job"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert "labels" not in job["metadata"], "without Kueue"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["containers"][0]["image"] == "registry/hammer:1"
    assert read_pod_variables(pod)["MASTER_ADDR"] == "llama3-8b-16-1-0.llama3-8b-16-1"
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "securityContext" not in pod["containers"][0]
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [{"claimName": "disk"}]


def read_pod_variables(pod: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in pod["containers"][0]["env"]}


@pytest.mark.parametrize("launcher", KUBERNETES_LAUNCHERS)
def test_every_manifest_runs_the_script_of_torchrun(launcher: Any) -> None:
    assert read_manifest(launcher)["ConfigMap"]["data"]["launch.sh"] == render(build(), "torchrun")
    spec = find_job_spec(launcher, OPTIONS)
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node", "TrainJob and the failure policy look for this name"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/rdma_shared_device_a": 1}
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"]}
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        **{"launch": "/launch", "workspace": "/workspace", "data": "/data", "shared-memory": "/dev/shm"}
    }
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    user = re.search(r"--uid (\d+) ", (ROOT / "docker" / "Dockerfile").read_text())
    assert user is not None
    assert pod["securityContext"]["fsGroup"] == int(user[1]), "the image's user must be able to write"
    assert pod["terminationGracePeriodSeconds"] == 600
    names = list(read_pod_variables(pod))
    assert names.index("NODE_RANK") < names.index("LOG_DIR"), "only earlier variables are expanded"


@pytest.mark.parametrize("launcher", ["jobset", "trainjob"])
def test_all_pods_restart_together_except_after_a_configuration_error(launcher: Any) -> None:
    spec = find_job_spec(launcher)
    assert spec["backoffLimit"] == 0, "one failed pod fails the job, and the JobSet restarts"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    objects = read_manifest(launcher)
    job_set = (
        objects["JobSet"]["spec"] if launcher == "jobset" else objects["TrainingRuntime"]["spec"]["template"]["spec"]
    )
    (rule,) = job_set["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    variables = read_pod_variables(spec["template"]["spec"])
    assert variables["MASTER_ADDR"] == "llama3-8b-16-1-node-0-0.llama3-8b-16-1"
    assert variables["LOG_DIR"].endswith("/logs/attempt-$(ATTEMPT)/node-$(NODE_RANK)")


def test_train_job_and_its_runtime() -> None:
    objects = read_manifest("trainjob", OPTIONS)
    job, runtime = objects["TrainJob"], objects["TrainingRuntime"]
    assert job["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert (job["spec"]["trainer"], runtime["spec"]["mlPolicy"]) == (
        {"numNodes": 2, "numProcPerNode": 8},
        {"numNodes": 2, "torch": {}},
    )
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


@pytest.mark.parametrize(("launcher", "kind"), [("kubernetes", "Job"), ("jobset", "JobSet"), ("trainjob", "TrainJob")])
def test_the_queue_of_kueue(launcher: Any, kind: str) -> None:
    labels = read_manifest(launcher, OPTIONS)[kind]["metadata"]["labels"]
    assert labels == {"kueue.x-k8s.io/queue-name": "training"}


def test_names_that_kubernetes_refuses() -> None:
    with raises_problem(ConfigError, "queue:", "must be a name of lower-case", "got 'My Queue'"):
        KubernetesOptions(queue="My Queue")
    KubernetesOptions(volume_claim="a.b-c" + "d" * 100)
    for name in ("a..b", "a-.b", "-a", "a\n", "q" * 64):
        with raises_problem(ConfigError, "queue:", "at most 63 long", f"got {name!r}"):
            KubernetesOptions(queue=name)
    for image in ("", "my image", "image\n"):
        with raises_problem(ConfigError, "image:", "without spaces", f"got {image!r}"):
            KubernetesOptions(image=image)
    assert read_rdma("rdma/ib=8") == ("rdma/ib", 8)
    for text in ("rdma/ib", "ib=8", "rdma/ib=0"):
        with raises_problem(ConfigError, "rdma:", "must be RESOURCE=COUNT", f"got '{text}'"):
            read_rdma(text)


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text("# head\n--lr 3e-4  # first\n\n--load 'a b' --seed 2\n")
    assert read_sweep(path) == ["--lr 3e-4", "--load 'a b' --seed 2"]
    # As a shell: a # inside a word or quotes begins no comment. Windows writes the first and the last characters.
    path.write_bytes("\ufeff--name run#3 --seed 2 #3\r\n--name '#4' \"a # b\" $HOME #\r\n--seed 5".encode())
    assert read_sweep(path) == ["--name 'run#3' --seed 2", "--name '#4' 'a # b' '$HOME'", "--seed 5"]
    path.write_text("--save a\n--seed 1 --save=b\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    expected = [f"{path}:{number}: must not have --save" for number in (1, 2)]
    assert [problem.split(", got")[0] for problem in caught.value.problems] == expected
    path.write_text("# nothing\n")
    with raises_problem(ConfigError, f"{path}:", "must have a line for each task, got none"):
        read_sweep(path)
    path.write_text("3e-4\n--seed 'open\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    assert [problem.split(": must")[0] for problem in caught.value.problems] == [f"{path}:1", f"{path}:2"]
    with raises_problem(ConfigError, "sweep:", "must be a readable text file", "gone.txt"):
        read_sweep(tmp_path / "gone.txt")


def test_the_shipped_layout_is_that_of_the_recipe() -> None:
    launch = build_shipped_launch()
    assert (launch.num_nodes, launch.processes_per_node) == (2, 8)
    assert launch.plan.global_batch_size == PRESETS["hammer-1b4"].recipe.global_batch_size


def test_experts_are_sent_and_computed_as_they_were_projected() -> None:
    """For a preset, whose recipe has the all-to-all, and for a model that is given flag by flag."""
    model = PRESETS["qwen3-30b-a3b"].model
    layout = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "tensor_model_parallel_size": 1}
    layout |= {"virtual_pipeline_model_parallel_size": 2}
    for own in (model, replace(model, name="own")):
        assert select_backend(build(model=own, layout=layout, seq_length=4096).plan) == "te"  # of grouped products
        options = ExpertOptions(dispatcher="hybridep", overlaps_communication=True)
        flags = list_launch_flags(build(model=own, layout=layout, seq_length=4096, experts=options))
        assert flags.count("--moe-token-dispatcher-type") == 1
        read = parse(*flags, "--mock-data", "--dry-run").namespace
        assert (read.moe_token_dispatcher_type, read.moe_flex_dispatcher_backend) == ("flex", "hybridep")
        assert read.overlap_moe_expert_parallel_comm
        assert read.moe_grouped_gemm
        plain = list_launch_flags(build(model=own, layout=layout, seq_length=4096))
        read = parse(*plain, "--mock-data", "--dry-run").namespace
        assert (read.moe_token_dispatcher_type, read.overlap_moe_expert_parallel_comm) == ("alltoall", False)
