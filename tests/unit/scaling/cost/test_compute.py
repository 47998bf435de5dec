"""Time of work on a device: bounded by arithmetic or by memory, and shapes that reach neither bound."""

import dataclasses
import math

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import FIRST_DELIVERED, build_prior_coefficients, replace_values
from megatron_hammer.scaling.cost.compute import (
    build_rates,
    estimate_gemm_s,
    estimate_layer,
    estimate_maturity_ratio,
    estimate_power_ratio,
)
from megatron_hammer.scaling.cost.operators import Gemm, Shard, build_layer_work
from megatron_hammer.scaling.hardware.catalogue import select_gpu
from megatron_hammer.scaling.plan import LOW_PRECISIONS

# of software that is fully tuned
COEFFICIENTS = replace_values(build_prior_coefficients(), {"immaturity_ratio": 1e-12})
H100 = select_gpu("h100-sxm")
RATES = build_rates(H100, "bf16", COEFFICIENTS)
SHARD = Shard(1, 1, 1, 1, False, 4096, 4096, "bf16", True, 128)


def reach(gemm: Gemm) -> float:
    """Share of the attainable rate."""
    flops = 2 * gemm.m * gemm.n * gemm.k * gemm.batch
    return flops / RATES.gemm_flops_per_s / estimate_gemm_s(gemm, RATES, COEFFICIENTS.gemm_fill_waves)


def test_large_products_come_near_the_ratio_of_the_peak():
    assert 0.95 < reach(Gemm(16384, 16384, 16384)) < 1
    assert RATES.gemm_flops_per_s == pytest.approx(0.72 * 1e12 * H100.bf16_tflops, rel=1e-3)


@pytest.mark.parametrize("smaller", [Gemm(512, 16384, 16384), Gemm(16384, 512, 16384), Gemm(16384, 16384, 128)])
def test_every_short_side_costs_speed(smaller):
    assert reach(smaller) < reach(Gemm(16384, 16384, 16384)) - 0.02


def test_a_product_with_one_row_reads_its_weights_and_no_faster():
    read_s = 2 * 8192 * 8193 / RATES.memory_bytes_per_s
    assert estimate_gemm_s(Gemm(1, 8192, 8192), RATES, 0.0) == pytest.approx(read_s, rel=1e-3)


@pytest.mark.parametrize(("precision", "element_bytes"), [("fp32", 4), ("fp16", 2), ("bf16", 2), ("fp8", 2)])
def test_a_product_moves_the_bytes_of_its_elements(precision: str, element_bytes: int) -> None:
    """One row by a square weight is bound by reading the weight; its short result is written in the same precision."""
    rates = build_rates(H100, precision, COEFFICIENTS)
    expected_s = element_bytes * (8192 * 8193 / rates.memory_bytes_per_s + 8192 / rates.result_bytes_per_s)
    assert estimate_gemm_s(Gemm(1, 8192, 8192), rates, 0.0) == pytest.approx(expected_s)


def test_products_in_eight_bits_read_half_and_write_sixteen() -> None:
    rates = build_rates(H100, "fp8", COEFFICIENTS)
    expected_s = 8192 * 8193 / rates.memory_bytes_per_s + 2 * 8192 / rates.result_bytes_per_s
    assert estimate_gemm_s(Gemm(1, 8192, 8192, is_low_precision=True), rates, 0.0) == pytest.approx(expected_s)


def test_equal_products_of_a_batch_fill_the_device_together():
    one = estimate_gemm_s(Gemm(1024, 128, 1024), RATES, COEFFICIENTS.gemm_fill_waves)
    many = estimate_gemm_s(Gemm(1024, 128, 1024, 64), RATES, COEFFICIENTS.gemm_fill_waves)
    assert many < 0.5 * 64 * one


def test_fp8_is_faster_only_on_gpus_that_have_it():
    low = build_rates(H100, "fp8", COEFFICIENTS)
    assert low.low_gemm_flops_per_s > 1.5 * low.gemm_flops_per_s
    with pytest.raises(
        ConfigError,
        match=r"^precision: must be one that the GPU.*got precision=fp8, gpu=a100-sxm-80gb",
    ):
        build_rates(select_gpu("a100-sxm-80gb"), "fp8", COEFFICIENTS)
    with pytest.raises(ConfigError, match="got precision=bf16, gpu=v100-sxm2-16gb"):
        build_rates(select_gpu("v100-sxm2-16gb"), "bf16", COEFFICIENTS)


def test_boards_of_less_power_run_slower_than_their_peak_says():
    assert estimate_power_ratio(H100, COEFFICIENTS) == pytest.approx(1, abs=0.01)
    pcie = select_gpu("h100-pcie")
    watts = pcie.power_w / pcie.bf16_tflops / (700 / 989)
    assert estimate_power_ratio(pcie, COEFFICIENTS) == pytest.approx(watts**0.5, rel=1e-6)
    assert estimate_power_ratio(pcie, COEFFICIENTS) < 0.95


def test_a_gpu_with_coefficients_of_its_own_takes_them_as_they_are():
    pcie = select_gpu("h100-pcie")
    own = dataclasses.replace(COEFFICIENTS.gpus["hopper"], gemm_ratio=0.5)
    coefficients = dataclasses.replace(COEFFICIENTS, gpus={**COEFFICIENTS.gpus, "h100-pcie": own})
    rates = build_rates(pcie, "bf16", coefficients)
    assert rates.gemm_flops_per_s == pytest.approx(0.5e12 * pcie.bf16_tflops)


def test_short_sequences_and_narrow_heads_slow_attention_down():
    model = PRESETS["llama2-7b"].model
    work = build_layer_work(model, SHARD)

    def rate(seq_length: int, head_dim: int) -> float:
        shard = SHARD._replace(seq_length=seq_length)
        time = estimate_layer(work, shard, head_dim, H100, COEFFICIENTS)
        return work.forward.attention_flops / time.forward.attention_s

    assert rate(32768, 128) > 1.2 * rate(1024, 128)
    assert rate(4096, 64) < 0.93 * rate(4096, 128)


def test_exponentials_slow_attention_as_far_as_they_are_not_hidden():
    work = build_layer_work(PRESETS["llama2-7b"].model, SHARD)
    scores = 32 * 4096 * 4096 / 2  # of every head, under a causal mask
    assert work.forward.attention_exponentials == work.backward.attention_exponentials == scores
    hidden = replace_values(COEFFICIENTS, {"exponential_exposed_ratio": 1e-12})
    for gpu in (select_gpu("gb200"), select_gpu("gb300")):
        slow, fast = (estimate_layer(work, SHARD, 128, gpu, one).forward for one in (COEFFICIENTS, hidden))
        expected_s = COEFFICIENTS.exponential_exposed_ratio * scores / gpu.exponentials_per_s
        assert slow.attention_s - fast.attention_s == pytest.approx(expected_s)


def test_software_of_a_new_generation_becomes_faster_for_years():
    coefficients = replace_values(COEFFICIENTS, {"immaturity_ratio": 0.5, "maturing_years": 1.0})
    gb200, a100 = select_gpu("gb200"), select_gpu("a100-sxm-80gb")
    first = FIRST_DELIVERED["blackwell"]
    assert estimate_maturity_ratio(gb200, coefficients, first) == pytest.approx(1 / 1.5)
    assert estimate_maturity_ratio(gb200, coefficients, first - 1) == pytest.approx(1 / 1.5)
    assert estimate_maturity_ratio(gb200, coefficients, first + 1) == pytest.approx(1 / (1 + 0.5 / math.e))
    assert estimate_maturity_ratio(a100, coefficients, 2021.0) == 1
    new, old = (build_rates(gb200, "bf16", coefficients, first + age) for age in (9.0, 0.0))
    assert new.gemm_flops_per_s == pytest.approx(1.5 * old.gemm_flops_per_s, rel=1e-3)
    assert new.memory_bytes_per_s == pytest.approx(1.5 * old.memory_bytes_per_s, rel=1e-3)


@pytest.mark.parametrize(
    ("gpu", "formats"),
    [
        ("a100-sxm-80gb", ()),
        ("l40s", ("fp8",)),
        ("h100-sxm", ("fp8", "fp8_blockwise")),
        ("gb200", ("fp8", "fp8_blockwise", "mxfp8", "nvfp4")),
    ],
)
def test_a_gpu_runs_the_formats_whose_scales_its_tensor_cores_apply(gpu, formats):
    assert tuple(name for name in LOW_PRECISIONS if select_gpu(gpu).find_peak_tflops(name) is not None) == formats


def test_each_eight_bit_format_has_its_speed():
    """On Blackwell, TransformerEngine runs the blockwise recipe as mxfp8."""
    gb200 = select_gpu("gb200")
    tensorwise = build_rates(gb200, "fp8", COEFFICIENTS).low_gemm_flops_per_s
    for name in ("mxfp8", "fp8_blockwise"):
        assert build_rates(gb200, name, COEFFICIENTS).low_gemm_flops_per_s == pytest.approx(
            COEFFICIENTS.mxfp8_gemm_ratio * tensorwise
        )
    hopper, blockwise = (build_rates(H100, name, COEFFICIENTS).low_gemm_flops_per_s for name in LOW_PRECISIONS[:2])
    assert blockwise == pytest.approx(COEFFICIENTS.blockwise_gemm_ratio * hopper)


def test_memory_ratio_acts_on_what_memory_bounds():
    slower = replace_values(COEFFICIENTS, {"hopper.memory_ratio": 0.4})
    work = build_layer_work(PRESETS["llama2-7b"].model, SHARD)
    fast = estimate_layer(work, SHARD, 128, H100, COEFFICIENTS).forward
    slow = estimate_layer(work, SHARD, 128, H100, slower).forward
    assert slow.pointwise_s == pytest.approx(2 * fast.pointwise_s)
    assert slow.attention_s == pytest.approx(fast.attention_s)
    assert slow.host_s == fast.host_s
