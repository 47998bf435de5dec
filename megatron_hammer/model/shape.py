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
    has_scaled_inputs: bool = False  # the weight of an expert multiplies its input and not its output (Llama 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-latent attention (MLA): queries, keys and values are made of compressed states (arXiv 2405.04434, 2.1).

    A head has qk_head_dim channels that no rope turns and qk_pos_emb_head_dim that one does; the latter are the same
    for the keys of all heads. Its value has v_head_dim. q_lora_rank: None where queries are not compressed.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int

    @property
    def query_dim(self) -> int:
        """Channels of a head's query, and of its key."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim


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
    is_chunked: the sequence is cut into chunks of num_tokens, and a position sees what its chunk has before it.
    """

    num_tokens: int
    layers: tuple[int, ...]
    is_chunked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The architecture of one model, in mcore's names. Two shapes are equal if they describe the same architecture.

    activation "gelu_tanh" is the tanh approximation (GPT-2's `gelu_new`), which Megatron's fused bias-gelu computes;
    "gelu_erf" is the exact function, which Megatron computes without that fusion. "clamped_swiglu" is GPT-OSS's: gate
    and up are clamped, the gate is multiplied by sigmoid(1.702 gate), and 1 is added to the other half.
    With latent_attention, num_query_groups equals num_attention_heads and kv_channels is None: the heads have the
    widths that it says. has_qk_norm then means norms of the compressed states.
    Some fields can be studied and not trained here: config/model_arguments.py lists them.
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
    activation: Literal["swiglu", "gelu_tanh", "gelu_erf", "clamped_swiglu"] = "swiglu"
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
    latent_attention: LatentAttention | None = None
    has_attention_sinks: bool = False  # a learned score for each head, which takes part in the softmax (GPT-OSS)
    has_qk_l2_norm: bool = False  # a norm without weights on queries and keys that a rope has turned (Llama 4)
    has_query_temperature: bool = False  # layers without rope scale queries by their position (Llama 4)
    num_mtp_layers: int = 0  # behind the others, which predict further tokens (arXiv 2412.19437, section 2.2)

    @property
    def head_dim(self) -> int:
        """Channels of a head's query and key; those of its value are `value_dim`."""
        if self.latent_attention is not None:
            return self.latent_attention.query_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.latent_attention is None else self.latent_attention.v_head_dim

    @property
    def is_gated(self) -> bool:
        """Whether the first linear of an MLP has the rows of a gate beside those of the other half."""
        return self.activation in ("swiglu", "clamped_swiglu")

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

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same parameters and see as much."""
        window = self.sliding_window
        return not self.is_mixed and (window is None or len(window.layers) == self.num_layers)

    def is_mixture(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def has_window(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, sees a window or a chunk only."""
        return self.sliding_window is not None and layer in self.sliding_window.layers

    def select_kind(self, layer: int) -> "ModelShape":
        """This model with all layers as layer `layer`, counted from 0: mixtures or not, with the window or without."""
        moe, window = self.moe, self.sliding_window
        if moe is not None and moe.dense_layers:
            moe = replace(moe, dense_layers=()) if self.is_mixture(layer) else None
        if window is not None and len(window.layers) < self.num_layers:
            window = replace(window, layers=tuple(range(self.num_layers))) if self.has_window(layer) else None
        return (
            self if (moe, window) == (self.moe, self.sliding_window) else replace(self, moe=moe, sliding_window=window)
        )

    def split_kinds(self, layers: Iterable[int] | None = None) -> list[tuple["ModelShape", int]]:
        """(this model with that kind of layer only, how many of `layers` are of it); see select_kind.

        layers: all by default. A kind that none of them has is left out. Dense layers come first, and of each of these
        kinds those without the window. What is true of a layer, such as its number of parameters, is asked of such a
        model; what is true of the whole model, such as num_layers, is not.
        """
        chosen = list(range(self.num_layers) if layers is None else layers)
        if chosen and self.is_uniform:
            return [(self, len(chosen))]
        counts: dict[tuple[bool, bool], list[int]] = {}
        for layer in chosen:
            counts.setdefault((self.is_mixture(layer), self.has_window(layer)), []).append(layer)
        return [(self.select_kind(alike[0]), len(alike)) for _, alike in sorted(counts.items())]


def shorten_attention_scale(scale: float, head_dim: int) -> float | None:
    """`ModelShape.attention_scale` of this scale: None for the usual one, within the rounding of its last digits."""
    return None if math.isclose(scale, head_dim**-0.5, rel_tol=1e-15) else scale
