"""Which fused kernels a run has by default, and what switches each one off."""

from argparse import Namespace

import pytest

from tests.helpers.parsed_flags import TINY, find, parse, plan

CUDA = {"platform": "cuda"}


def derive(*flags: str, platform: str = "cuda", backend: str = "torch") -> Namespace:
    return parse(*TINY, *flags, platform=platform, backend=backend).namespace


KERNELS = ("apply_rope_fusion", "fused_single_qkv_rope", "fused_residual_rmsnorm", "gradient_accumulation_fusion")


def list_on(namespace: Namespace) -> list[str]:
    return [name for name in KERNELS if getattr(namespace, name)]


def test_each_backend_has_its_own() -> None:
    assert list_on(derive()) == list(KERNELS)
    assert list_on(derive(backend="te")) == [name for name in KERNELS if name != "fused_residual_rmsnorm"]
    assert list_on(derive(platform="cpu")) == []


@pytest.mark.parametrize(
    "flags, off",
    [
        ("--no-triton-kernels", KERNELS[:3]),
        ("--no-rope-fusion", KERNELS[:2]),
        ("--no-gradient-accumulation-fusion", KERNELS[3:]),
        ("--use-torch-fsdp2", KERNELS[3:]),
        ("--use-megatron-fsdp", KERNELS[3:]),
        ("--normalization LayerNorm", KERNELS[2:3]),
        ("--apply-layernorm-1p", KERNELS[2:3]),
        ("--recompute-granularity selective --recompute-modules layernorm", KERNELS[2:3]),
        ("--recompute-granularity selective", ()),
        ("--rotary-interleaved", KERNELS[1:2]),
        ("--qk-layernorm", KERNELS[1:2]),
        ("--no-rope-freq 2", KERNELS[1:2]),
        ("--position-embedding-type learned_absolute", KERNELS[1:2]),  # megatron then switches off the first itself
        ("--tensor-model-parallel-size 8 --group-query-attention --num-query-groups 2", KERNELS[1:2]),
        ("--tensor-model-parallel-size 2 --group-query-attention --num-query-groups 2", ()),
    ],
)
def test_what_switches_them_off(flags: str, off: tuple[str, ...]) -> None:
    world = plan(8)
    assert list_on(derive(*flags.split(), *world)) == [name for name in KERNELS if name not in off]


def test_a_kernel_that_cannot_work_is_refused() -> None:
    asked = ("--fused-residual-rmsnorm", "--no-triton-kernels")
    (problem,) = find(*TINY, *plan(1), *asked, **CUDA)
    assert problem.startswith("fused-residual-rmsnorm: is a Triton kernel on the torch backend")
    (problem,) = find(*TINY, *plan(1), "--fused-residual-rmsnorm", "--apply-layernorm-1p", **CUDA)
    assert problem.startswith("fused-residual-rmsnorm: has no zero-centered weights on the torch backend")
    layernorm = ("--recompute-granularity", "selective", "--recompute-modules", "layernorm")
    (problem,) = find(*TINY, *plan(1), "--fused-residual-rmsnorm", *layernorm, **CUDA)
    assert "fused-residual-rmsnorm: returns the residual" in problem
    assert "drop layernorm from --recompute-modules" in problem
    assert find(*TINY, *plan(1), *layernorm, **CUDA) == []


@pytest.mark.parametrize("flag", ["--triton-kernels", "--no-triton-kernels"])
@pytest.mark.parametrize("place", [{"platform": "cpu"}, {"platform": "cuda", "backend": "te"}], ids=str)
def test_the_switch_is_refused_where_there_are_no_kernels(flag: str, place: dict[str, str]) -> None:
    (problem,) = find(*TINY, *plan(1), flag, **place)
    assert problem.startswith("triton-kernels: has no effect without the torch backend on a GPU")


def test_the_memory_estimate_follows() -> None:
    def estimate(*flags: str, backend: str = "torch") -> tuple[bool, bool]:
        run = parse("--preset", "hammer-1b4", *plan(8), *flags, platform="cuda", backend=backend).require_plan()
        return run.memory.has_separate_values, run.memory.has_fused_weight_gradients

    assert estimate() == (True, False)
    assert estimate("--no-triton-kernels") == (False, False)
    assert estimate("--no-triton-kernels", "--precision", "fp32") == (True, False)  # each head has its own values
    assert estimate(backend="te") == (True, True)
    assert estimate("--no-rope-fusion", "--no-gradient-accumulation-fusion", backend="te") == (True, False)
