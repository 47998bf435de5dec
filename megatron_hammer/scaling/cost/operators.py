"""The work of one transformer layer and of the model's two ends on one rank: multiplications, bytes, kernels.

Nothing here depends on a GPU or a coefficient: `compute.py` turns work into seconds. A matrix product keeps its shape,
because its efficiency depends on the shape. Everything bound by memory is counted in bytes read and written.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from megatron_hammer.model.accounting import padded_vocab_size
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.plan import (
    LOW_PRECISIONS,
    TODAY,
    ContextExchange,
    CudaGraphs,
    ExpertOptions,
    Precision,
)

# Bytes that unfused attention moves for each of the s * s * heads scores, 16-bit elements, one-byte dropout masks.
# Forward: scores written (2), scaled and masked softmax (2 + 2), dropout (2 + 2 + 1), read by the product with the
# values (2). Backward: dropped scores read (2), their gradient written (2), dropout (2 + 1 + 2), softmax (2 + 2 + 2),
# read by the gradients of query and key (2 + 2). Source: the kernels of megatron's CoreAttention with
# --masked-softmax-fusion. Why these bytes matter: Dao et al. 2022, arXiv 2205.14135, section 2.2.
UNFUSED_FORWARD_BYTES_PER_SCORE = 13
UNFUSED_BACKWARD_BYTES_PER_SCORE = 19
# Dao 2023, arXiv 2307.08691, section 2.3.1: the backward pass has five matrix products where the forward pass has two,
# because scores are not stored but computed again.
FLASH_BACKWARD_RATIO = 2.5
# Each further chunk of a ring of keys: attention, its message, and merging the results (TransformerEngine's
# AttnFuncWithCPAndKVP2P). Of a causal mask the merged parts are three quarters on average.
RING_KERNELS = 6
RING_SHARE = 0.75


class Gemm(NamedTuple):
    """`batch` products [m, k] x [k, n]. extra_bytes: traffic of the epilogue besides the result."""

    m: float
    n: float
    k: float
    batch: float = 1.0
    extra_bytes: float = 0.0
    is_low_precision: bool = False  # runs in fp8 or fp4 if the training does


class Work(NamedTuple):
    """One pass (forward or backward) over one micro-batch on one rank."""

    gemms: tuple[Gemm, ...] = ()
    attention_flops: float = 0.0  # of flash attention
    attention_exponentials: float = 0.0  # of its softmax; the backward pass computes them again
    attention_gemms: tuple[Gemm, ...] = ()  # of unfused attention
    attention_bytes: float = 0.0  # of unfused attention
    pointwise_bytes: float = 0.0
    num_kernels: float = 0.0


class LayerWork(NamedTuple):
    forward: Work
    backward: Work


class Shard(NamedTuple):
    """What the work of a layer depends on besides the model: parallel sizes, micro-batch and precision."""

    tp: int
    cp: int
    ep: int
    expert_tp: int
    has_sequence_parallel: bool
    num_tokens: int  # of one micro-batch on one context-parallel rank, before tensor parallelism
    seq_length: int
    precision: Precision
    has_flash_attention: bool
    vocab_divisible_by: int
    experts: ExpertOptions = ExpertOptions()
    cuda_graphs: CudaGraphs = "none"
    software_year: float = TODAY
    context_exchange: ContextExchange = "p2p"
    all_to_all_size: int = 1  # of the context-parallel ranks, those that exchange heads

    @property
    def num_ring_steps(self) -> int:
        """Chunks of keys that reach a rank one after the other. Attention is computed, and merged, chunk by chunk."""
        return 1 if self.context_exchange == "all_gather" else self.cp // self.all_to_all_size

    @property
    def num_queries(self) -> float:
        """Of a sequence, those whose attention one rank computes."""
        return self.seq_length * self.all_to_all_size / self.cp

    @property
    def element_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def is_low_precision(self) -> bool:
        return self.precision in LOW_PRECISIONS

    @property
    def pointwise_tokens(self) -> float:
        """Tokens of the norms, dropouts and residuals on one rank; sequence parallelism splits the sequence."""
        return self.num_tokens / self.tp if self.has_sequence_parallel else self.num_tokens


@lru_cache(maxsize=4096)
def build_layer_work(model: ModelShape, shard: Shard) -> LayerWork:
    """The work of one layer, forward and backward. A mixture of experts is left out: expert_work.py counts it."""
    linears = build_linears(model, shard)
    attention_forward, attention_backward = _build_attention(model, shard)
    forward_bytes, backward_bytes = _count_pointwise_bytes(model, shard)
    cast_forward, cast_backward = count_cast_bytes(linears, shard)
    tensor_kernels = (2 if shard.tp > 1 else 0) + RING_KERNELS * (shard.num_ring_steps - 1)
    # Stacks of 2020 to 2022: scores, masks and dropouts one by one, biases apart, random states kept for recomputation.
    unfused_kernels = 0 if shard.has_flash_attention else 25
    forward = Work(
        gemms=tuple(linears),
        pointwise_bytes=forward_bytes + cast_forward,
        num_kernels=13 + unfused_kernels + tensor_kernels + (8 if shard.is_low_precision else 0),
        **attention_forward,
    )
    backward = Work(
        gemms=tuple(product for linear in linears for product in differentiate(linear)),
        pointwise_bytes=backward_bytes + cast_backward,
        num_kernels=22 + unfused_kernels + tensor_kernels + (8 if shard.is_low_precision else 0),
        **attention_backward,
    )
    return LayerWork(forward, backward)


@lru_cache(maxsize=4096)
def build_embedding_work(model: ModelShape, shard: Shard) -> LayerWork:
    """The look-up of the input embedding: rows read and written forward, gradients of 4 bytes added backward."""
    size = shard.num_tokens * model.hidden_size
    norm = 2.5 * shard.element_bytes * size if model.has_embedding_norm else 0.0
    return LayerWork(
        Work(pointwise_bytes=3 * shard.element_bytes * size + norm, num_kernels=6),
        Work(pointwise_bytes=(2 * shard.element_bytes + 8) * size + norm, num_kernels=6),
    )


@lru_cache(maxsize=4096)
def build_head_work(model: ModelShape, shard: Shard) -> LayerWork:
    """The final norm, the head over the padded vocabulary and the cross-entropy; always in 16 bit or fp32.

    megatron.core.tensor_parallel.cross_entropy makes a fp32 copy of the logits and passes over it for the maximum, the
    subtraction, the target's logit, the exponential, its sum and the division; backward it scales, and casts back.
    """
    rows = padded_vocab_size(
        model.vocab_size, divisible_by=shard.vocab_divisible_by, tensor_model_parallel_size=shard.tp
    )
    columns = rows / shard.tp
    head = Gemm(shard.num_tokens, columns, model.hidden_size)
    logits = shard.num_tokens * columns
    norm_bytes = 5 * shard.element_bytes * shard.num_tokens * model.hidden_size
    # A layer for further tokens has logits and a loss of its own, and a projection of two hidden states to one.
    losses, further = 1 + model.num_mtp_layers, model.num_mtp_layers
    joined = Gemm(shard.num_tokens, model.hidden_size / shard.tp, 2 * model.hidden_size)
    forward = (head,) * losses + (joined,) * further
    return LayerWork(
        Work(forward, pointwise_bytes=losses * (30 * logits + 0.4 * norm_bytes), num_kernels=18 * losses),
        Work(
            tuple(product for gemm in forward for product in differentiate(gemm)),
            pointwise_bytes=losses * (14 * logits + 0.6 * norm_bytes),
            num_kernels=12 * losses,
        ),
    )


def build_linears(model: ModelShape, shard: Shard) -> list[Gemm]:
    """Forward products of the linears of one layer, [tokens, in] x [in, out / tp] or the rows cut for the second."""
    values = model.num_attention_heads * model.value_dim
    output = Gemm(shard.num_tokens, model.hidden_size, values / shard.tp, is_low_precision=shard.is_low_precision)
    ffn = model.ffn_hidden_size if model.moe is None else 0
    return [*_build_projections(model, shard), output, *build_mlp_linears(model, shard, ffn)]


def _build_projections(model: ModelShape, shard: Shard) -> list[Gemm]:
    """From the hidden state to queries, keys and values.

    In multi-latent attention every tensor-parallel rank compresses the tokens that it holds, and then computes its
    heads of all tokens. Source: megatron.core MLASelfAttention.
    """
    h, tokens, low = model.hidden_size, shard.num_tokens, shard.is_low_precision
    latent = model.latent_attention
    if latent is None:
        queries = model.num_attention_heads * model.head_dim
        # With more ranks than query groups, each rank computes one whole group, so there are tp of them.
        key_values = 2 * max(model.num_query_groups, shard.tp) * model.head_dim
        return [Gemm(tokens, (queries + key_values) / shard.tp, h, is_low_precision=low)]
    down = [Gemm(shard.pointwise_tokens, latent.kv_lora_rank + latent.qk_pos_emb_head_dim, h, is_low_precision=low)]
    if latent.q_lora_rank is not None:
        down.append(Gemm(shard.pointwise_tokens, latent.q_lora_rank, h, is_low_precision=low))
    return down + build_latent_up_projections(model, shard)


def build_latent_up_projections(model: ModelShape, shard: Shard) -> list[Gemm]:
    """Of multi-latent attention: from the compressed states to this rank's heads. None of any other attention."""
    latent = model.latent_attention
    if latent is None:
        return []
    tokens, low = shard.num_tokens, shard.is_low_precision
    heads = model.num_attention_heads / shard.tp
    return [
        Gemm(tokens, heads * latent.query_dim, latent.q_lora_rank or model.hidden_size, is_low_precision=low),
        Gemm(tokens, heads * (latent.qk_head_dim + latent.v_head_dim), latent.kv_lora_rank, is_low_precision=low),
    ]


def build_mlp_linears(model: ModelShape, shard: Shard, ffn_hidden_size: int) -> list[Gemm]:
    """An MLP that all tokens pass, or none for a width of 0."""
    if not ffn_hidden_size:
        return []
    h, tokens, low = model.hidden_size, shard.num_tokens, shard.is_low_precision
    # The first linear of SwiGLU has the rows of the gate and of the up projection.
    gates = 2 if model.is_gated else 1
    ffn = ffn_hidden_size / shard.tp
    return [Gemm(tokens, gates * ffn, h, is_low_precision=low), Gemm(tokens, h, ffn, is_low_precision=low)]


def differentiate(linear: Gemm) -> tuple[Gemm, Gemm]:
    """The gradient of the input, and that of the weight, which the epilogue adds to an fp32 buffer (4 + 4 bytes)."""
    m, n, k, batch = linear.m, linear.n, linear.k, linear.batch
    accumulated_bytes = 8.0 * n * k * batch
    return (
        Gemm(m, k, n, batch, is_low_precision=linear.is_low_precision),
        Gemm(k, n, m, batch, accumulated_bytes, linear.is_low_precision),
    )


def _build_attention(model: ModelShape, shard: Shard) -> tuple[dict[str, Any], dict[str, Any]]:
    """Core attention of one rank: FLOPs of flash attention under a causal mask, or products and traffic of the scores.

    Each of the two forward products takes 2 * head_dim operations per query, head and key that the query sees. Flash
    attention skips the masked blocks; unfused attention does them all, half of which are masked.
    """
    heads = model.num_attention_heads / shard.tp
    if shard.has_flash_attention:
        scores = shard.num_tokens * _count_keys(model, shard.seq_length) * heads
        flops = 2.0 * scores * (model.head_dim + model.value_dim)
        return (
            {"attention_flops": flops, "attention_exponentials": scores},
            {"attention_flops": FLASH_BACKWARD_RATIO * flops, "attention_exponentials": scores},
        )
    s, d = shard.seq_length, model.head_dim
    heads *= shard.num_tokens * shard.cp / s  # of all sequences
    scores = heads * s * s / shard.cp
    forward = (Gemm(s / shard.cp, s, d, heads), Gemm(s / shard.cp, d, s, heads))
    backward = (forward[0], forward[1], Gemm(s, d, s / shard.cp, heads), Gemm(s, d, s / shard.cp, heads))
    scale = shard.element_bytes / 2
    return (
        {"attention_gemms": forward, "attention_bytes": scale * UNFUSED_FORWARD_BYTES_PER_SCORE * scores},
        {"attention_gemms": backward, "attention_bytes": scale * UNFUSED_BACKWARD_BYTES_PER_SCORE * scores},
    )


def _count_keys(model: ModelShape, seq_length: int) -> float:
    """Keys that a query sees, on average over a sequence: all before it, or those of its window or its chunk.

    The window of a model counts where all of its layers have it; step_time.py asks for one kind of layer at a time.
    """
    window = model.sliding_window
    if window is None or len(window.layers) < model.num_layers or window.num_tokens >= seq_length:
        return seq_length / 2
    if window.is_chunked:
        return window.num_tokens / 2
    # The first queries see fewer keys than the window has.
    return window.num_tokens - window.num_tokens**2 / (2 * seq_length)


def _count_pointwise_bytes(model: ModelShape, shard: Shard) -> tuple[float, float]:
    """(forward, backward) bytes of norms, residuals, rotary, activation and of layout changes between kernels.

    Elements read and written, forward and backward: a norm 2 and 3, a residual sum (with bias and dropout if the model
    has them) 3 and 2, a rotation of query and key 2 and 2, SwiGLU 3 and 5, GELU 2 and 3. Unfused attention moves query,
    key, value and output once more.
    """
    along_sequence = shard.pointwise_tokens * model.hidden_size  # two norms and two residual sums make 10 and 10
    queries = shard.num_tokens * model.num_attention_heads * model.head_dim / shard.tp
    key_values = shard.num_tokens * max(model.num_query_groups / shard.tp, 1) * model.head_dim
    latent = model.latent_attention
    forward, backward = 10 * along_sequence, 10 * along_sequence
    turned = 2 * model.rope_share * (queries + key_values)
    forward, backward = forward + turned, backward + turned
    if model.residual_multiplier != 1.0:  # reads and writes the outputs of attention and MLP
        forward, backward = forward + 4 * along_sequence, backward + 4 * along_sequence
    if latent is not None:  # norms of the compressed states, and copies of the shared key to all heads
        ranks = (latent.q_lora_rank or 0) + latent.kv_lora_rank
        states = shard.pointwise_tokens * ranks
        forward, backward = forward + 2 * (states + key_values), backward + 3 * states + 2 * key_values
    elif model.has_qk_norm:
        forward, backward = forward + 2 * (queries + key_values), backward + 3 * (queries + key_values)
    if not shard.has_flash_attention:
        moved = 2 * (2 * queries + 2 * key_values)
        dropout = 2 * along_sequence  # masks, and biases added in separate kernels
        forward, backward = forward + moved + dropout, backward + moved + dropout
    else:  # the fused qkv is split into contiguous parts, and the gradient is put together again
        forward, backward = forward + (queries + 2 * key_values), backward + 2 * (queries + 2 * key_values)
    merges = RING_SHARE * (shard.num_ring_steps - 1)  # each reads two parts and writes their sum
    forward, backward = forward + 3 * merges * queries, backward + 3 * merges * (queries + 2 * key_values)
    if model.moe is None:
        read_written = (3, 5) if model.is_gated else (2, 3)
        width = shard.num_tokens * model.ffn_hidden_size / shard.tp
        forward, backward = forward + read_written[0] * width, backward + read_written[1] * width
    return shard.element_bytes * forward, shard.element_bytes * backward


# Bytes of casting one operand of an 8- or 4-bit product: it is read (2) and written twice, once transposed, with the
# scales of its blocks. nvfp4 reads it once more for the largest value, and once more for the transposed copy, which
# goes through a Hadamard transform. TransformerEngine's recipes: delayed scaling takes the largest value in passing.
CAST_BYTES: dict[Precision, float] = {
    "fp8": 4.0,
    "fp8_blockwise": 4.0 + 2 * 4 / 128,
    "mxfp8": 4.0 + 2 / 32,
    "nvfp4": 6.0 + 2 * (1 / 2 + 1 / 16),
}


def count_cast_bytes(linears: list[Gemm], shard: Shard) -> tuple[float, float]:
    """Bytes of casting the operands of 8- and 4-bit products.

    Forward the inputs are cast, backward the gradients of the outputs; weights are cast once per step and kept. Source:
    TransformerEngine's cast-transpose kernels. The product of the weight's gradient uses the transposed copy.
    """
    low = [linear for linear in linears if linear.is_low_precision]
    if not low:
        return 0.0, 0.0
    forward = sum(linear.m * linear.k * linear.batch for linear in low)
    backward = sum(linear.m * linear.n * linear.batch for linear in low)
    cast_bytes = CAST_BYTES[shard.precision]
    return cast_bytes * forward, cast_bytes * backward
