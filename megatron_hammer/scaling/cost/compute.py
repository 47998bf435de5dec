"""Seconds that one GPU needs for the work of `operators.py`."""

import math
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import FIRST_DELIVERED, REFERENCE_WATTS, Coefficients, select_generation
from megatron_hammer.scaling.cost.operators import Gemm, LayerWork, Shard, Work
from megatron_hammer.scaling.plan import LOW_PRECISIONS, TODAY, Gpu, Precision

TILE_ELEMENTS = 128 * 256  # of a result that one multiprocessor works on: the large tiles of cuBLAS and CUTLASS
# Flash attention computes as many exponentials for narrow heads as for wide ones: a width of 64 reaches 90% of the
# speed of 128.
HEAD_DIM_FILL = 16


class PassTime(NamedTuple):
    """Seconds of the device for one pass, and seconds that the host needs to launch it."""

    matmul_s: float
    attention_s: float
    pointwise_s: float
    gap_s: float  # between kernels
    host_s: float

    @property
    def device_s(self) -> float:
        return self.matmul_s + self.attention_s + self.pointwise_s + self.gap_s


def add_pass_times(first: PassTime, second: PassTime) -> PassTime:
    return PassTime(*(one + other for one, other in zip(first, second, strict=True)))


class LayerTime(NamedTuple):
    forward: PassTime
    backward: PassTime


class Rates(NamedTuple):
    """What a GPU delivers at a precision: the data sheet's peaks times the coefficients."""

    gemm_flops_per_s: float  # of 16- or 32-bit products
    low_gemm_flops_per_s: float  # of 8- or 4-bit products, where the run has them
    attention_flops_per_s: float
    exponentials_per_s: float  # as far as they are not hidden
    memory_bytes_per_s: float
    result_bytes_per_s: float  # of a product's result, as far as it is not hidden
    wave_elements: float  # elements of a result that are worked on at once
    kernel_s: float
    element_bytes: int  # of a result, and of an operand of 16- or 32-bit products


@lru_cache(maxsize=256)
def build_rates(gpu: Gpu, precision: Precision, coefficients: Coefficients, software_year: float = TODAY) -> Rates:
    """Raises ConfigError for a precision that the GPU has no units for."""
    own = coefficients.select_gpu(gpu)
    # In 8- or 4-bit training the head stays in 16 bits (operators.py), so both peaks are needed.
    peak = gpu.find_peak_tflops("bf16" if precision in LOW_PRECISIONS else precision)
    low_peak, low_ratio = gpu.find_peak_tflops(precision), own.gemm_ratio
    if precision in LOW_PRECISIONS:
        low_ratio = own.gemm_4bit_ratio if precision == "nvfp4" else own.gemm_8bit_ratio
        low_ratio *= _find_format_ratio(gpu, precision, coefficients)
    if not peak or not low_peak:
        raise ConfigError(
            f"precision: must be one that the GPU multiplies in, got precision={precision}, gpu={gpu.name}. "
            "Use bf16 (fp16 before Ampere)."
        )
    maturity = estimate_maturity_ratio(gpu, coefficients, software_year)
    power = estimate_power_ratio(gpu, coefficients) * maturity
    memory_bytes_per_s = own.memory_ratio * gpu.memory_bytes_per_s * maturity
    # Attention of a GPU with its own coefficients was measured with its exponentials.
    exponentials = math.inf if gpu.name in coefficients.gpus else gpu.exponentials_per_s or math.inf
    return Rates(
        gemm_flops_per_s=1e12 * peak * own.gemm_ratio * power,
        low_gemm_flops_per_s=1e12 * low_peak * low_ratio * power,
        attention_flops_per_s=1e12 * peak * own.attention_ratio * power,
        exponentials_per_s=exponentials * maturity / coefficients.exponential_exposed_ratio,
        memory_bytes_per_s=memory_bytes_per_s,
        result_bytes_per_s=memory_bytes_per_s / coefficients.gemm_epilogue_ratio,
        wave_elements=TILE_ELEMENTS * own.num_multiprocessors,
        kernel_s=own.kernel_s,
        element_bytes=4 if precision == "fp32" else 2,
    )


def _find_format_ratio(gpu: Gpu, precision: Precision, coefficients: Coefficients) -> float:
    """Speed of 8-bit products with block scales, over that with one scale per tensor."""
    if precision == "mxfp8" or (precision == "fp8_blockwise" and gpu.find_peak_tflops("mxfp8") is not None):
        return coefficients.mxfp8_gemm_ratio  # TransformerEngine runs the blockwise recipe on Blackwell as mxfp8
    return coefficients.blockwise_gemm_ratio if precision == "fp8_blockwise" else 1.0


def estimate_maturity_ratio(gpu: Gpu, coefficients: Coefficients, software_year: float) -> float:
    """Speed of the device's work with software of this year, over that with fully tuned software.

    Kernels, fusions and CUDA graphs of a generation with new tensor cores are tuned for years after its delivery.
    """
    delivered = FIRST_DELIVERED.get(select_generation(gpu))
    if delivered is None or gpu.name in coefficients.gpus:
        return 1.0
    age = max(0.0, software_year - delivered)
    return 1.0 / (1.0 + coefficients.immaturity_ratio * math.exp(-age / coefficients.maturing_years))


def estimate_power_ratio(gpu: Gpu, coefficients: Coefficients) -> float:
    """How much faster matrix products run than on the generation's reference board, which has other watts per TFLOP/s.

    Large products run at the clock that the board's power allows, not at the data sheet's (H100 PCIe has 46% of the SXM
    board's power for 76% of its peak). A GPU with its own coefficients needs no such correction.
    """
    generation = select_generation(gpu)
    if gpu.name in coefficients.gpus:
        return 1.0
    ratio = gpu.power_w / (gpu.bf16_tflops or gpu.fp16_tflops) / REFERENCE_WATTS[generation]
    # Bounds for unusual boards, such as desktop GPUs, on which no run was fitted.
    return min(1.2, max(0.4, ratio**coefficients.power_exponent))


def estimate_gemm_s(gemm: Gemm, rates: Rates, fill_waves: float) -> float:
    """Matrix products: bound by arithmetic or by reading the operands, plus the part of writing the result that shows.

    Filling and emptying the multiprocessors costs a part of a wave of tiles, whatever the number of waves (NVIDIA,
    Matrix Multiplication Background, "wave quantization"), so small results run below the peak. Writing that is not
    hidden has the same effect on products with a short summed dimension.
    """
    m, n, k, batch, extra_bytes, is_low = gemm
    results = m * n * batch
    rate = rates.low_gemm_flops_per_s if is_low else rates.gemm_flops_per_s
    multiply_s = 2.0 * results * k / rate * (1.0 + fill_waves * rates.wave_elements / results)
    # nvfp4 has half a byte. It is counted as one byte, because the shipped coefficients were fitted with it so.
    operand_bytes = 1 if is_low else rates.element_bytes
    read_s = operand_bytes * batch * k * (m + n) / rates.memory_bytes_per_s
    return max(multiply_s, read_s) + (rates.element_bytes * results + extra_bytes) / rates.result_bytes_per_s


def estimate_work(work: Work, rates: Rates, coefficients: Coefficients, attention_fill: float) -> PassTime:
    """attention_fill: the share of its speed that flash attention reaches at this sequence length and head width."""
    fill_waves = coefficients.gemm_fill_waves
    attention_s = work.attention_flops / (rates.attention_flops_per_s * attention_fill)
    attention_s += work.attention_exponentials / rates.exponentials_per_s
    if work.attention_gemms:
        attention_s += sum(estimate_gemm_s(gemm, rates, fill_waves) for gemm in work.attention_gemms)
        attention_s += work.attention_bytes / rates.memory_bytes_per_s
    return PassTime(
        matmul_s=sum(estimate_gemm_s(gemm, rates, fill_waves) for gemm in work.gemms),
        attention_s=attention_s,
        pointwise_s=work.pointwise_bytes / rates.memory_bytes_per_s,
        gap_s=work.num_kernels * rates.kernel_s,
        host_s=work.num_kernels * coefficients.host_s,
    )


def estimate_attention_fill(length: float, head_dim: int, fill_tokens: float) -> float:
    """The share of its full speed that flash attention reaches with this sequence length and head width."""
    # Scaled to 1 for a head of 128, the width that attention_ratio describes.
    return length / (length + fill_tokens) * (head_dim / (head_dim + HEAD_DIM_FILL) * (128 + HEAD_DIM_FILL) / 128)


def estimate_layer(work: LayerWork, shard: Shard, head_dim: int, gpu: Gpu, coefficients: Coefficients) -> LayerTime:
    """Both passes of a layer, or of an end of the model, over one micro-batch."""
    rates = build_rates(gpu, shard.precision, coefficients, shard.software_year)
    fill = estimate_attention_fill(shard.num_queries, head_dim, coefficients.attention_fill_tokens)
    return LayerTime(
        estimate_work(work.forward, rates, coefficients, fill),
        estimate_work(work.backward, rates, coefficients, fill),
    )
