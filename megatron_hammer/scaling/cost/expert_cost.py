"""Seconds of a mixture of experts: its products, its memory traffic, its host, and the exchange that is not hidden."""

from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.compute import PassTime, Rates, build_rates, estimate_work
from megatron_hammer.scaling.cost.expert_exchange import estimate_exchange_s
from megatron_hammer.scaling.cost.expert_work import ROUTER_KERNELS, MixtureWork, build_mixture_work
from megatron_hammer.scaling.cost.operators import Gemm, Shard
from megatron_hammer.scaling.plan import Cluster, Gpu

TILE_ROWS = 128  # of a tile of the experts' products: the last tile of an expert is half empty on average


class MixtureCost(NamedTuple):
    """A mixture over one micro-batch. exchange_s: dispatch and combination of one pass, before any of it is hidden."""

    forward: PassTime
    backward: PassTime
    exchange_s: float


@lru_cache(maxsize=8192)
def build_mixture_cost(
    model: ModelShape, shard: Shard, gpu: Gpu, cluster: Cluster, coefficients: Coefficients
) -> MixtureCost:
    """The cost of the mixture of one layer, cached by what it depends on."""
    work = build_mixture_work(model, shard)
    rates = build_rates(gpu, shard.precision, coefficients, shard.software_year)
    return MixtureCost(
        _estimate_pass(work, 0, shard, rates, coefficients),
        _estimate_pass(work, 1, shard, rates, coefficients),
        2.0 * estimate_exchange_s(model, shard, cluster, coefficients),
    )


def _estimate_pass(work: MixtureWork, index: int, shard: Shard, rates: Rates, coefficients: Coefficients) -> PassTime:
    """index: 0 is the forward pass, 1 the backward pass."""
    own = coefficients.experts
    rest = estimate_work(work.rest[index], rates, coefficients, 1.0)
    experts_s = sum(
        estimate_grouped_gemm_s(gemm, rates, coefficients, is_grouped=shard.experts.has_grouped_gemm)
        for gemm in work.experts[index]
    )
    host_s, wait_s = _estimate_host_s(work, index, shard, coefficients)
    return PassTime(
        matmul_s=rest.matmul_s + experts_s,
        attention_s=0.0,
        pointwise_s=rest.pointwise_s + work.permuted_bytes / (rates.memory_bytes_per_s * own.permute_ratio),
        gap_s=rest.gap_s + wait_s,
        host_s=host_s,
    )


def estimate_grouped_gemm_s(gemm: Gemm, rates: Rates, coefficients: Coefficients, *, is_grouped: bool) -> float:
    """The products of all local experts, [tokens of an expert, k] x [k, n] each.

    An expert's tokens fill whole tiles, so few tokens per expert waste a part of the work. Grouped products fill the
    device together, and single ones each on its own. The weights of every expert are read, however few its tokens.
    """
    m, n, k, batch, extra_bytes, is_low = gemm
    own = coefficients.experts
    rows = m + TILE_ROWS / 2
    results = rows * n * batch
    rate = rates.low_gemm_flops_per_s if is_low else rates.gemm_flops_per_s
    rate *= own.low_grouped_gemm_ratio if is_low else own.grouped_gemm_ratio
    filled = results if is_grouped else results / batch
    multiply_s = 2.0 * results * k / rate * (1.0 + coefficients.gemm_fill_waves * rates.wave_elements / filled)
    operand_bytes = 1 if is_low else rates.element_bytes
    read_s = operand_bytes * batch * k * (m + n) / rates.memory_bytes_per_s
    return max(multiply_s, read_s) + (rates.element_bytes * m * n * batch + extra_bytes) / rates.result_bytes_per_s


def _estimate_host_s(work: MixtureWork, index: int, shard: Shard, coefficients: Coefficients) -> tuple[float, float]:
    """(seconds of the host for one pass, seconds that the device waits for it).

    Tokens that are neither dropped nor padded have shapes that the host must read back in every forward pass. A graph
    of the whole step needs none of that.
    """
    own, graphs = coefficients.experts, shard.cuda_graphs
    if graphs == "step":
        return 0.0, 0.0
    kernels = work.rest[index].num_kernels - (ROUTER_KERNELS if graphs != "none" else 0)
    launch_s = own.expert_launch_s if shard.experts.has_grouped_gemm else own.host_s
    wait_s = own.sync_s if index == 0 and not shard.experts.pads_to_capacity else 0.0
    return kernels * own.host_s + work.num_launches[index] * launch_s, wait_s
