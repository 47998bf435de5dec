"""What a model is: `ModelShape`, the one description that every room speaks. No torch, no megatron.

Names are mcore's. It is translated to and from Megatron's arguments in `config/model_arguments.py` and to and from a
Hugging Face config in `checkpoint/hugging_face/`, nowhere else. How a model is trained is a `Recipe` (presets/).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeShape:
    """The mixture-of-experts layers of a model, which all have the same experts.

    is_topk_renormalized: True where the chosen experts' weights sum to one (Mixtral), False in Qwen2-MoE. Megatron
    divides other scores than softmax by their sum where several experts are chosen, and never a single one.
    has_expert_bias: a bias in fp32 for each expert, added to its score for the choice only, and moved in training by
    the load of the experts instead of a loss (arXiv 2408.15664). It is a buffer and no parameter.
    """

    num_experts: int
    router_topk: int
    ffn_hidden_size: int  # of one routed expert
    shared_expert_intermediate_size: int = 0  # 0: no shared expert
    has_shared_expert_gate: bool = False  # Qwen2-MoE: the shared expert is scaled by sigmoid(x . w)
    is_topk_renormalized: bool = False
    aux_loss_coeff: float = 0.01
    dense_layers: tuple[int, ...] = ()  # these, counted from 0, have an MLP of the model's ffn_hidden_size instead
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    has_expert_bias: bool = False
    topk_scaling_factor: float = 1.0  # of the chosen experts' weights
    # Group-limited routing: only experts of the group_topk best of num_groups groups are chosen. Both or neither.
    num_groups: int | None = None
    group_topk: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretch of the slow rotary frequencies for longer contexts; megatron-core fixes all but `factor`.

    Source of the defaults: megatron.core RotaryEmbedding._apply_scaling and gpt_config_from_args.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN's stretch of the rotary frequencies (arXiv 2309.00071), in the numbers of megatron's YarnRotaryEmbedding.

    Dimensions that turn fewer than `beta_slow` times within the original positions have their frequency divided by
    `factor`, those of more than `beta_fast` turns keep it, with a ramp between the two. has_whole_bounds: the ends of
    the ramp are rounded outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    has_whole_bounds: bool = True

    @property
    def attention_factor(self) -> float:
        """What sines and cosines are multiplied by. Source: megatron's _yarn_get_concentration_factor."""
        return self._grow(self.mscale) / self._grow(self.mscale_all_dim)

    def _grow(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidingWindow:
    """num_tokens: that a position sees in these layers, itself and those before it; elsewhere it sees all before it.

    layers: from 0, ascending; at least one. Megatron's --window-size has one token less: those before the position.
    """

    num_tokens: int
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The architecture of one model, in mcore's names. Two shapes are equal if they describe the same architecture.

    activation "gelu_tanh" is the tanh approximation (GPT-2's `gelu_new`), which Megatron's fused bias-gelu computes;
    "gelu_erf" is the exact function, which Megatron computes without that fusion.
    """

    name: str = field(compare=False)
    source: str = field(compare=False)  # where the numbers come from
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # equal to num_attention_heads: multi-head attention
    vocab_size: int  # of the tokenizer, before padding for tensor parallelism
    max_position_embeddings: int
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    activation: Literal["swiglu", "gelu_tanh", "gelu_erf"] = "swiglu"
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: int = 10_000
    has_linear_bias: bool = False  # every linear but the head; then has_qkv_bias is set too
    has_qkv_bias: bool = False  # linear_qkv
    has_tied_embeddings: bool = False
    has_embedding_norm: bool = False  # LayerNorm (weight, bias) on the embedding's output, whatever `normalization` is
    init_method_std: float = 0.02
    moe: MoeShape | None = None  # then ffn_hidden_size is that of its dense layers, if any: the experts have their own
    kv_channels: int | None = None  # width of a head; None: hidden_size / num_attention_heads, which is never spelt out
    has_qk_norm: bool = False  # a norm of width head_dim on every head's query and key, before the rotation (Qwen3)
    rope_scaling: RopeScaling | YarnScaling | None = None
    rotary_seq_len_interpolation_factor: int | None = None  # positions are divided by it (linear scaling)
    rotary_percent: float = 1.0  # share of a head's channels that the rope turns, the first of them (Phi-3)
    layers_without_rope: tuple[int, ...] = ()  # from 0, ascending; they turn no query and no key (SmolLM3)
    embedding_multiplier: float = 1.0  # of the embedding's output (Granite, --use-mup; so the next three)
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim), which is never spelt out
    residual_multiplier: float = 1.0  # of what attention and MLP add to the residual
    logits_multiplier: float = 1.0
    sliding_window: SlidingWindow | None = None

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rope_share(self) -> float:
        """The share of the layers that turn queries and keys."""
        if self.position_embedding_type != "rope":
            return 0.0
        return 1 - len(self.layers_without_rope) / self.num_layers

    @property
    def is_mixed(self) -> bool:
        """Whether dense layers stand among mixtures. A checkpoint then has no tensors of all layers together."""
        return self.moe is not None and bool(self.moe.dense_layers)

    def is_mixture(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def split_kinds(self, layers: Iterable[int] | None = None) -> list[tuple["ModelShape", int]]:
        """(this model with that kind of layer only, how many of `layers` are of it), dense layers first.

        layers: all by default. A kind that none of them has is left out. What is true of a layer, such as its number of
        parameters, is asked of such a model; what is true of the whole model is not.
        """
        chosen = list(range(self.num_layers) if layers is None else layers)
        if self.moe is None or not self.is_mixed:
            return [(self, len(chosen))] if chosen else []
        num_mixtures = sum(map(self.is_mixture, chosen))
        dense, mixture = replace(self, moe=None), replace(self, moe=replace(self.moe, dense_layers=()))
        kinds = [(dense, len(chosen) - num_mixtures), (mixture, num_mixtures)]
        return [(kind, num_layers) for kind, num_layers in kinds if num_layers]


def shorten_attention_scale(scale: float, head_dim: int) -> float | None:
    """`ModelShape.attention_scale` of this scale: None for the usual one, within the rounding of its last digits."""
    return None if math.isclose(scale, head_dim**-0.5, rel_tol=1e-15) else scale
