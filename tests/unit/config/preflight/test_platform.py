"""What a platform, a backend, a GPU or an installation cannot do is refused, each with its fact and its remedy."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
from megatron.core.transformer.enums import AttnBackend

from megatron_hammer.config.flag_tables.refused import EMERGING, REFUSALS
from megatron_hammer.config.preflight import layout
from megatron_hammer.config.preflight.flags import find_flag_problems
from megatron_hammer.config.preflight.platform import FILES, NEEDS_TE, PACKAGES
from megatron_hammer.platforms import cpu, cuda
from tests.helpers.parsed_flags import TINY, find, parse, with_flags

BASE = parse(*TINY).settings


def find_on_gpu(*typed: str, **values: object) -> list[str]:
    """The problems of single flags on the cuda platform with the te backend."""
    settings = {"platform": "cuda", "backend": "te", "distributed_backend": "nccl"} | values
    return find_flag_problems(with_flags(BASE, *typed, **settings))


@pytest.mark.parametrize(
    "name", [*NEEDS_TE, *FILES, *(row.name for row in REFUSALS), *(package[0] for package in PACKAGES)]
)
def test_attribute_exists(name: str) -> None:
    assert name in BASE.flags.values


@pytest.mark.parametrize("name", [row[0] for row in cpu.UNSUPPORTED])
def test_platform_attribute_exists(name: str) -> None:
    assert name in BASE.flags.values


@pytest.mark.parametrize("name", NEEDS_TE)
def test_flags_that_need_transformer_engine_are_refused_without_it(name: str) -> None:
    value = {"te_precision_config_file": __file__}.get(name, "hybrid")
    (problem,) = find_on_gpu(backend="torch", **{name: value})
    assert "needs the te backend (TransformerEngine), got" in problem
    assert find_on_gpu(**{name: value}) == []


def test_context_parallelism_needs_transformer_engine() -> None:
    (problem,) = find_on_gpu(backend="torch", context_parallel_size=2)
    assert "context-parallel-size: needs the te backend" in problem


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"hybrid_context_parallel": True}, "hybrid-context-parallel: splits packed documents"),
        ({"moe_use_upcycling": True}, "moe-use-upcycling: would build the dense model with experts"),
        ({"init_model_with_meta_device": True}, "init-model-with-meta-device: leaves the weights uninitialised"),
        ({"optimizer": "sgd"}, "optimizer: has no state that the distributed optimizer can shard, got optimizer=sgd"),
        (
            {"optimizer": "muon", "bf16": True, "platform": "cpu", "backend": "torch", "world_size": 2}
            | {"distributed_backend": "gloo"},
            "optimizer: would gather weights of different sizes, which gloo cannot",
        ),
        ({"optimizer": "soap", "bf16": True}, "optimizer: keeps matrices of other shapes"),
        ({"fake_process_group": True}, "fake-process-group: would train with collectives that exchange nothing"),
        ({"profile": True, "use_pytorch_profiler": True}, "use-pytorch-profiler: writes beside the folder"),
        (
            {"wandb_project": "p", "wandb_exp_name": "e", "save": "runs"},
            "wandb-project: gets its values where Megatron writes TensorBoard's",
        ),
        ({"non_persistent_ckpt_type": "in_memory"}, "non-persistent-ckpt-type: is not implemented"),
        ({"no_save_optim": True, "save": "runs"}, "no-save-optim: leaves out what a run needs to resume"),
        ({"no_save_rng": True, "save": "runs"}, "no-save-rng: leaves out what a run needs to resume"),
        ({"ckpt_format": "torch", "save": "runs"}, "ckpt-format: saves an optimizer that Megatron cannot load again"),
        ({"fp32_residual_connection": True, "bf16": True}, "fp32-residual-connection: gives fp32 activations"),
        ({"attention_backend": AttnBackend.fused}, "attention-backend: is a kernel of 16-bit numbers"),
        ({"fp8_param_gather": True}, "fp8-param-gather: needs the optimizer's master weights"),
        (
            {"use_transformer_engine_op_fuser": True, "moe_grouped_gemm": True},
            "use-transformer-engine-op-fuser: has no fused grouped GEMM",
        ),
        ({"dataloader_type": "external"}, "dataloader-type: leaves loading to a program's own loader"),
        ({"adlr_autoresume": True}, "adlr-autoresume: needs a library of one cluster"),
        ({"config_logger_dir": "logs"}, "config-logger-dir: pickles process groups"),
        ({"dataloader_fast_cache_load": True}, "dataloader-fast-cache-load: needs the folder of the cache"),
        ({"phase_transition_iterations": [1]}, "phase-transition-iterations: needs a run that is counted in samples"),
        ({"attention_backend": AttnBackend.flash}, "got attention_backend=flash. Pass --precision bf16"),
        ({"use_ring_exchange_p2p": True}, "use-ring-exchange-p2p: calls torch.distributed.ring_exchange"),
        ({"use_sharp": True}, "use-sharp: asks for a process group before"),
        ({"distributed_backend": "gloo"}, "distributed-backend: gloo has no reduce-scatter between GPUs"),
        ({"nccl_communicator_config_path": "/nowhere"}, "nccl-communicator-config-path: must be a file that exists"),
        (
            {"cross_entropy": "chunked", "sequence_parallel": True, "tensor_model_parallel_size": 2},
            "cross-entropy: would cut the sequence, which --sequence-parallel has already divided",
        ),
        ({"cross_entropy": "chunked", "use_torch_fsdp2": True}, "cross-entropy: would use the output layer several"),
        (
            {"cross_entropy": "chunked", "defer_embedding_wgrad_compute": True},
            "cross-entropy: would run the output layer twice",
        ),
        ({"softmax_type": "learnable"}, "softmax-type: is not supported here"),
        ({"position_embedding_type": "mrope"}, "position-embedding-type: is not supported here"),
    ],
)
def test_what_would_crash_once_all_ranks_are_up_is_refused(
    values: dict[str, object], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # every package is there
    (problem,) = find_on_gpu(**values)
    assert match in problem


def test_what_works_is_not_refused() -> None:
    assert find_on_gpu() == []
    assert find_on_gpu(optimizer="sgd", use_distributed_optimizer=False) == []
    assert find_on_gpu(softmax_type="off-by-one") == find_on_gpu(softmax_type="off-by-one", backend="torch") == []
    assert find_on_gpu(cross_entropy="chunked", tensor_model_parallel_size=2) == []


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"optimizer": "muon", "bf16": True}, "emerging-optimizers"),
        ({"optimizer": "lion", "bf16": True}, "emerging-optimizers"),
        ({"async_save": True, "async_strategy": "nvrx"}, "nvidia-resiliency-ext"),
        ({"use_megatron_fsdp": True, "init_model_with_meta_device": True}, "einops"),
        ({"enable_msc": True}, "multi-storage-client"),
        ({"log_straggler": True}, "nvidia-ml-py"),
        ({"attention_backend": AttnBackend.flash, "bf16": True}, "--no-build-isolation flash-attn"),
        ({"tensorboard_dir": "logs"}, "tensorboard"),
        ({"cross_entropy": "in-place"}, "triton"),
    ],
)
def test_a_missing_package_is_named(values: dict[str, object], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every run on a GPU needs Triton, so its absence would hide the others.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" != package or None)
    (problem,) = find_on_gpu(**values)
    assert "which is not installed" in problem
    assert f"pip install {package}" in problem
    assert find_on_gpu(**values, dry_run=True, requested_world_size=8) == []  # a cluster has its own packages
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert find_on_gpu(**values) == []


def test_triton_needs_a_compiler_and_the_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (problem,) = find_on_gpu()
    assert problem.startswith("PATH: must have gcc or clang")
    assert find_on_gpu(dry_run=True, requested_world_size=8) == []  # a cluster has its own
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert find_on_gpu() == []
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    (problem,) = find_on_gpu()
    assert problem.startswith("Python.h: must be there for Triton")
    assert str(tmp_path) in problem
    assert find_flag_problems(BASE) == []  # the cpu platform compiles nothing


@pytest.mark.parametrize("optimizer", [name for name in EMERGING if name != "soap"])
def test_optimizers_that_are_distributed_in_bf16_alone(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (problem,) = find_on_gpu(optimizer=optimizer, bf16=False)
    assert "optimizer: is distributed over ranks in bf16 alone" in problem
    assert f"got optimizer={optimizer}" in problem
    assert find_on_gpu(optimizer=optimizer, bf16=True) == []
    assert find_on_gpu(optimizer=optimizer, bf16=False, use_distributed_optimizer=False) == []


def test_a_plan_for_a_cluster_does_not_ask_the_gpu_of_the_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "read_compute_capability", lambda index=0: (8, 0))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    values = {"fp8": "hybrid", "fp8_recipe": "mxfp8", "tensor_model_parallel_size": 2}
    assert len(find_on_gpu(**values)) == 2
    assert find_on_gpu(**values, dry_run=True, requested_world_size=64) == []


@pytest.mark.parametrize(
    ("values", "capability", "needed"),
    [
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, (8, 0), "8.9"),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, (8, 9), None),
        ({"fp8": "hybrid", "fp8_recipe": "blockwise"}, (8, 9), "9.0"),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, (9, 0), "10.0"),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, (10, 0), None),
        ({"fp4": "e2m1"}, (9, 0), "10.0"),
        ({"fp8": "hybrid", "fp8_recipe": "mxfp8"}, None, None),
    ],
)
def test_number_formats_need_their_generation(
    values: dict[str, object], capability: tuple[int, int] | None, needed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "read_compute_capability", lambda index=0: capability)
    problems = find_on_gpu(**values)
    assert len(problems) == (needed is not None)
    if problems:
        assert f"needs a GPU of compute capability {needed} or later" in problems[0]


@pytest.mark.parametrize(
    ("capability", "value", "values", "match"),
    [
        ((9, 0), None, {"tensor_model_parallel_size": 2}, "must be 1 with tensor or context parallelism"),
        ((9, 0), "8", {"context_parallel_size": 2}, "must be 1 with tensor or context parallelism"),
        ((9, 0), "1", {"tensor_model_parallel_size": 2}, None),
        ((9, 0), "8", {}, None),
        ((10, 0), None, {"tensor_model_parallel_size": 2}, None),
        (None, None, {"tensor_model_parallel_size": 2}, None),
        ((9, 0), "1", {"use_torch_fsdp2": True}, "must not be 1 with FSDP"),
        ((10, 0), "1", {"use_torch_fsdp2": True}, "must not be 1 with FSDP"),
        ((9, 0), None, {"use_torch_fsdp2": True, "tensor_model_parallel_size": 2}, None),
    ],
)
def test_environment_that_megatron_needs(
    capability: tuple[int, int] | None,
    value: str | None,
    values: dict[str, object],
    match: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "read_compute_capability", lambda index=0: capability)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
    problems = find_on_gpu(**values)
    assert len(problems) == (match is not None)
    if match is not None:
        assert f"CUDA_DEVICE_MAX_CONNECTIONS: {match}" in problems[0]


def test_more_processes_than_visible_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*TINY, "--micro-batch-size", "1")
    monkeypatch.setattr(layout, "count_devices", lambda: 4)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    (problem,) = find(*flags, platform="cuda")
    assert problem == (
        "nproc-per-node: must be at most the GPUs that PyTorch sees, got 8 processes on a node with 4. "
        "Lower it, or look at CUDA_VISIBLE_DEVICES, which may hide GPUs."
    )
    assert find(*flags, platform="cpu") == []
    monkeypatch.setattr(layout, "count_devices", lambda: 8)
    assert find(*flags, platform="cuda") == []
