import pytest

from megatron_hammer.config.preflight import memory as preflight_memory
from megatron_hammer.config.preflight.memory import (
    GIB,
    estimate_run_memory,
    find_memory_problems,
    read_available_bytes,
)
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.model.memory.options import WORKSPACE_BYTES, MemoryOptions
from tests.helpers.parsed_flags import TINY, parse, plan


def test_the_memory_of_this_machine_does_not_limit_a_plan_for_another() -> None:
    assert read_available_bytes(parse("--preset", "llama2-70b", *plan(32)).settings.machine) is None
    assert find_memory_problems(parse("--preset", "llama2-70b", *plan(32)).plan) == []


def test_processes_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_memory, "read_device_memory_bytes", lambda platform: 64 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_available_bytes(parse(*TINY).settings.machine) == 16 * GIB


def test_a_run_on_this_cpu_has_no_gpu_allowances() -> None:
    here, there = parse(*TINY).plan, parse(*TINY, *plan(1)).plan
    assert estimate_run_memory(here)[0].context_bytes == 0
    assert estimate_run_memory(there)[0].context_bytes > 0


@pytest.mark.parametrize(
    ("flags", "gib", "remedy"),
    [
        ("--preset hammer-1b4", "30", "Pass --micro-batch-size 4"),
        ("--preset hammer-1b4 --micro-batch-size 1 --seq-length 8192 --max-position-embeddings 8192", "16",
         "Raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or use more devices"),
        ("--preset llama3-8b --seq-length 65536 --max-position-embeddings 65536 --tensor-model-parallel-size 8", "56",
         "Pass --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_names_its_remedies(flags: str, gib: str, remedy: str) -> None:
    (problem,) = find_memory_problems(parse(*flags.split(), "--dry-run", "--gpu-memory-gib", gib).plan)
    assert f"GiB of {float(gib):.1f} (weights" in problem
    assert problem.endswith(f"{remedy}.")


def test_flags_of_recomputation() -> None:
    assert parse(*TINY).settings.recompute == "none"
    assert parse(*TINY, "--recompute-activations").settings.recompute == "selective"
    full = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    assert parse(*TINY, *full).settings.recompute == "full"


def build_options(*flags: str) -> MemoryOptions:
    return parse("--preset", "llama3-8b", *plan(8), *flags).plan.memory


def test_flags_that_change_memory_reach_the_estimate() -> None:
    plain = build_options()
    assert (plain.recompute, plain.cross_entropy, plain.gradient_bytes, plain.shard_size) == (
        "none",
        "in-place",
        4,
        None,
    )
    assert plain.workspace_bytes == WORKSPACE_BYTES
    assert parse(*TINY).plan.memory.workspace_bytes == 0  # cuBLAS is not there
    block = build_options(
        "--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "3"
    )
    assert (block.recompute, block.recompute_method, block.recompute_num_layers) == ("full", "block", 3)
    modules = build_options("--recompute-granularity", "selective", "--recompute-modules", "mlp", "core_attn")
    assert (modules.recompute, modules.recompute_modules) == ("selective", ("mlp", "core_attn"))
    assert build_options("--cross-entropy", "chunked").cross_entropy == "chunked"
    unfused = build_options("--no-bias-swiglu-fusion")
    assert (unfused.has_fused_activation, unfused.has_linear_offset) == (False, True)
    assert not plain.has_linear_offset
    dropout = build_options("--hidden-dropout", "0.1", "--attention-dropout", "0.2")
    assert dropout.has_hidden_dropout
    assert dropout.has_attention_dropout


@pytest.mark.parametrize(
    ("flags", "sharding"),
    [
        ((), "distributed_optimizer"),
        (("--use-torch-fsdp2",), "fsdp"),
        (("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"), "fsdp"),
        (("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads"), "distributed_optimizer"),
        (("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "no_shard"), "none"),
    ],
)
def test_sharding_flags_reach_the_estimate(flags: tuple[str, ...], sharding: str) -> None:
    assert build_options(*flags).sharding == sharding


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ((), "bf16"),
        (("--precision", "fp32"), "fp32"),
        (("--fp8-format", "hybrid"), "fp8"),
        (("--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"), "mxfp8"),
        (("--fp4-format", "e2m1"), "nvfp4"),
    ],
)
def test_number_format_of_the_products_reaches_the_estimate(flags: tuple[str, ...], precision: str) -> None:
    assert build_options(*flags).precision == precision


def count_activations(run: RunPlan) -> int:
    return estimate_run_memory(run)[0].list_parts()["activations"]


def test_fp8_keeps_less_of_a_micro_batch() -> None:
    usual = parse("--preset", "llama3-8b", *plan(8), platform="cuda", backend="te").plan
    fp8 = parse("--preset", "llama3-8b", *plan(8), "--fp8-format", "hybrid", platform="cuda", backend="te").plan
    assert count_activations(fp8) < count_activations(usual)


def test_fp32_attention_on_a_gpu_copies_grouped_heads() -> None:
    flags = ("--preset", "llama3-8b", *plan(8), "--precision", "fp32")
    torch_plan, te_plan = (parse(*flags, platform="cuda", backend=backend).plan for backend in ("torch", "te"))
    assert torch_plan.memory.has_expanded_heads
    assert not te_plan.memory.has_expanded_heads
    assert count_activations(torch_plan) > count_activations(te_plan)


def test_a_window_of_the_torch_backend_is_one_mask_and_copies_of_grouped_heads() -> None:
    """Its layers keep as much as those of full attention, on both backends."""

    def build(backend: str, *flags: str) -> MemoryOptions:
        return parse("--preset", "llama3-8b", *plan(8), *flags, platform="cuda", backend=backend).plan.memory

    window = ("--seq-length", "4096", "--window-size", "1023,0")
    plain, masked = build("torch", *window[:2]), build("torch", *window)
    assert masked.workspace_bytes - plain.workspace_bytes == 2 * 4096**2
    assert (plain.has_expanded_heads, masked.has_expanded_heads) == (False, True)
    assert build("torch", *window[:2], "--window-size", "4095,0").workspace_bytes == WORKSPACE_BYTES
    assert build("te", *window) == build("te", *window[:2])
