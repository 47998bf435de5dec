"""The forward work that recomputation repeats before the backward pass of a layer."""

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.operators import (
    Shard,
    Work,
    build_latent_up_projections,
    build_linears,
    build_mlp_linears,
)
from megatron_hammer.scaling.plan import RecomputeModule

# Shares of a layer's kernels that a module launches again, for the host's part.
MODULE_KERNELS: dict[RecomputeModule, int] = {
    "core_attn": 3, "layernorm": 2, "mla_up_proj": 6, "mlp": 4, "moe": 0, "moe_act": 1, "shared_experts": 4,
    "every_other_matmul": 8,
}  # fmt: skip


def build_recomputed_work(model: ModelShape, shard: Shard, modules: tuple[RecomputeModule, ...]) -> Work:
    """What selective recomputation repeats, without the core attention and without whole mixtures.

    A mixture repeats its activation function ("moe_act") and its shared expert; a dense layer its MLP.
    Source: --recompute-modules of megatron.core TransformerConfig.
    """
    gemms, elements, num_kernels = [], 0.0, 0
    moe = model.moe
    for module in modules:
        if module == "layernorm":
            elements += 4 * shard.pointwise_tokens * model.hidden_size
        elif module == "mla_up_proj":
            gemms += build_latent_up_projections(model, shard)
            elements += 4 * shard.num_tokens * model.num_attention_heads * model.head_dim / shard.tp
        elif module == "mlp" and moe is None:
            gemms += build_mlp_linears(model, shard, model.ffn_hidden_size)
            elements += 3 * shard.num_tokens * model.ffn_hidden_size / shard.tp
        elif module == "moe_act" and moe is not None:
            elements += 3 * shard.num_tokens / shard.tp * moe.router_topk * moe.ffn_hidden_size
        elif module == "shared_experts" and moe is not None:
            gemms += build_mlp_linears(model, shard, moe.shared_expert_intermediate_size)
            elements += 3 * shard.num_tokens * moe.shared_expert_intermediate_size / shard.tp
        elif module == "every_other_matmul":
            # Of q, k, v, out, gate, up and down, torchtitan repeats the second, fourth and sixth; up is as large as
            # the second linear of the MLP, and k is small.
            gemms += build_linears(model, shard)[1::2]
            elements += 4 * shard.pointwise_tokens * model.hidden_size
            elements += 3 * shard.num_tokens * model.ffn_hidden_size / shard.tp
        num_kernels += MODULE_KERNELS[module]
    return Work(gemms=tuple(gemms), pointwise_bytes=shard.element_bytes * elements, num_kernels=num_kernels)
