"""The work of a mixture of experts on one rank: router, permutation, the experts' products, and the shared expert.

`operators.py` has the rest of the layer, `expert_exchange.py` the way of the tokens between ranks, `expert_cost.py` the
seconds. Tokens are spread over the experts evenly on average, and the busiest rank has `imbalance_ratio` times as many.
"""

from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.scaling.cost.operators import (
    Gemm,
    LayerWork,
    Shard,
    Work,
    build_mlp_linears,
    count_cast_bytes,
    differentiate,
)
from megatron_hammer.scaling.plan import Dispatcher

# Elements that a permuted copy of a token is read and written in one pass, besides the exchange. all-to-all: the tokens
# are gathered into the order of experts (2), the received ones sorted by local expert (2), the results sorted back (2)
# and summed (1, and one per token). all-gather: gathered (2) and summed (2). DeepEP leaves the order of the local
# experts to the receiver (2 + 2). HybridEP writes it while it receives (1 + 1).
# Source: megatron.core.transformer.moe.token_dispatcher.
PERMUTED_ELEMENTS: dict[Dispatcher, float] = {"allgather": 4.0, "alltoall": 7.0, "deepep": 4.0, "hybridep": 2.0}
# Elements of an activation function that is a part of the products' kernel: backward its input is read and its gradient
# written.
FUSED_READ_WRITTEN = (0, 2)
# Kernels of one pass: scores, top-k and their statistics; everything else but the experts' products.
ROUTER_KERNELS = 12
# Bytes of one element of the experts' output for a bias that is scaled by the router: products, sums and the joining of
# all experts are in fp32 (TEGroupedMLP._apply_bias of megatron.core). Forward: scaled bias (4), sum (2 + 4 + 4), joined
# (4 + 4), cast (4 + 2). Backward: cast (2 + 4), parted (4 + 4), gradient of the output (4 + 2), and those of bias and
# weight, each a product and a sum (4 + 4 + 4).
BIAS_BYTES = (28.0, 44.0)
BIAS_LAUNCHES = (3, 6)  # for each expert
DISPATCH_KERNELS: dict[Dispatcher, int] = {"allgather": 10, "alltoall": 14, "deepep": 9, "hybridep": 7}


class MixtureWork(NamedTuple):
    """Both passes of a mixture. experts: its grouped products only; rest: everything else.

    num_launches: of the host for single experts, (forward, backward).
    """

    rest: LayerWork
    experts: tuple[tuple[Gemm, ...], tuple[Gemm, ...]]
    permuted_bytes: float  # of one pass
    num_launches: tuple[float, float]


@lru_cache(maxsize=4096)
def build_mixture_work(model: ModelShape, shard: Shard) -> MixtureWork:
    """The work of the mixture of one layer, forward and backward."""
    moe, options = model.moe, shard.experts
    assert moe is not None
    linears = _build_expert_linears(model, moe, shard)
    # The router is not split: each rank has its whole weight, and scores the tokens that it holds.
    router = Gemm(shard.pointwise_tokens, moe.num_experts, model.hidden_size)
    others = [router, *build_mlp_linears(model, shard, moe.shared_expert_intermediate_size)]
    copies = count_received_copies(moe, shard)
    read_written = (3, 5) if model.is_gated else (2, 3)
    width, shared = copies * moe.ffn_hidden_size / shard.expert_tp, moe.shared_expert_intermediate_size / shard.tp
    forward_cast, backward_cast = _count_expert_casts(linears, shard)
    other_forward, other_backward = count_cast_bytes(others, shard)
    casts = (forward_cast + other_forward, backward_cast + other_backward)
    activated = FUSED_READ_WRITTEN if has_fused_experts(shard) else read_written
    scores = 8.0 * shard.pointwise_tokens * moe.num_experts  # in fp32: softmax, top-k, map of tokens, auxiliary loss
    num_kernels = ROUTER_KERNELS + DISPATCH_KERNELS[options.dispatcher] + 4 * (len(others) > 1)
    # The products of a graph of the whole step add the bias themselves.
    has_loose_bias = model.has_linear_bias and shard.cuda_graphs != "step"
    passes = []
    for index in (0, 1):
        gemms = others if index == 0 else [product for linear in others for product in differentiate(linear)]
        elements = activated[index] * width + read_written[index] * shard.num_tokens * shared
        pointwise = shard.element_bytes * elements + 4.0 * scores + casts[index]
        if has_loose_bias:
            pointwise += BIAS_BYTES[index] * copies * model.hidden_size
        passes.append(Work(gemms=tuple(gemms), pointwise_bytes=pointwise, num_kernels=num_kernels))
    backward = tuple(product for linear in linears for product in differentiate(linear))
    # With low precision the operands of each expert are cast one by one.
    per_product = 2.0 if shard.is_low_precision else 1.0
    launches = [2 * per_product, 4 * per_product]
    if has_loose_bias:
        launches = [number + more for number, more in zip(launches, BIAS_LAUNCHES, strict=True)]
    local_experts = moe.num_experts / shard.ep
    return MixtureWork(
        rest=LayerWork(*passes),
        experts=(tuple(linears), backward),
        permuted_bytes=PERMUTED_ELEMENTS[options.dispatcher] * shard.element_bytes * copies * model.hidden_size,
        num_launches=(launches[0] * local_experts, launches[1] * local_experts),
    )


def has_fused_experts(shard: Shard) -> bool:
    """Whether one kernel computes both products of all experts with their activation function, and casts between them.

    TransformerEngine has it for MXFP8, and graphs of a whole step need it, because the sizes of tokens stay on the
    device (transformer_engine.pytorch.ops.fused, grouped MLP; TEGroupedMLP of megatron.core).
    """
    return shard.cuda_graphs == "step" and shard.precision == "mxfp8"


def _count_expert_casts(linears: list[Gemm], shard: Shard) -> tuple[float, float]:
    """As count_cast_bytes; a fused kernel casts the second product's input, and backward the first one's gradient."""
    if not has_fused_experts(shard):
        return count_cast_bytes(linears, shard)
    first, second = linears
    return count_cast_bytes([first], shard)[0], count_cast_bytes([second], shard)[1]


def count_received_copies(moe: MoeShape, shard: Shard) -> float:
    """Copies of tokens that the experts of one rank compute. A tensor group of experts computes the same tokens."""
    return shard.experts.imbalance_ratio * shard.num_tokens / shard.tp * shard.expert_tp * moe.router_topk


def _build_expert_linears(model: ModelShape, moe: MoeShape, shard: Shard) -> list[Gemm]:
    local_experts = moe.num_experts / shard.ep
    per_expert = count_received_copies(moe, shard) / local_experts
    ffn, h, low = moe.ffn_hidden_size / shard.expert_tp, model.hidden_size, shard.is_low_precision
    gates = 2 if model.is_gated else 1
    return [
        Gemm(per_expert, gates * ffn, h, local_experts, is_low_precision=low),
        Gemm(per_expert, h, ffn, local_experts, is_low_precision=low),
    ]
