"""Floating-point operations per trained token, forward and backward, in the four conventions in use.

A multiply-add counts as two operations, and the backward pass as twice the forward: 6 operations per weight and token.
No convention counts recomputation, norms, softmax or the optimizer. The four differ by up to 24% for one model, so an
MFU is always given with the letter of its convention.
"""

from typing import Literal

from megatron_hammer.model.parameters import count_active_parameters, count_matmul_parameters
from megatron_hammer.model.shape import ModelShape

FlopConvention = Literal["A", "B", "C", "D"]

FLOP_CONVENTIONS: dict[FlopConvention, str] = {
    "A": "layers and head, causal attention, no input embedding (Megatron-LM since 2025)",
    "B": "layers and head, full attention, no input embedding (Megatron-LM README, NeMo 24.07)",
    "C": "6N, no attention (Kaplan et al. 2020, arXiv 2001.08361)",
    "D": "6N and full attention (PaLM, arXiv 2204.02311, appendix B)",
}


def count_flops_per_token(
    model: ModelShape, seq_length: int, convention: FlopConvention = "A", *, vocab_size: int | None = None
) -> int:
    """Training FLOPs per token of a sequence of `seq_length`; of a MoE layer, only the experts that a token is routed
    to.

    vocab_size: the rows of embedding and head, by default the tokenizer's; Megatron-LM logs with the padded ones.
    A sliding window or chunk makes no difference in any of them: its layers count as full ones, as Megatron-LM counts
    them; what their attention really does is count_attended_keys. Layers for further tokens count as what they are: a
    layer, a projection and a head each. Source of A: megatron.training.training.num_floating_point_operations, pinned
    by a test.
    """
    # Scores and their product with the values: matmuls of s x head_dim and s x value_dim per head and query. A
    # multiply-add is 6 operations of training, and a causal mask leaves half of the s keys.
    width = model.num_attention_heads * (model.head_dim + model.value_dim)
    full_attention_flops = 6 * (model.num_layers + model.num_mtp_layers) * width * seq_length
    if convention == "A":
        return 6 * count_matmul_parameters(model, vocab_size) + full_attention_flops // 2
    if convention == "B":
        return 6 * count_matmul_parameters(model, vocab_size) + full_attention_flops
    if convention == "C":
        return 6 * count_active_parameters(model, vocab_size)
    return 6 * count_active_parameters(model, vocab_size) + full_attention_flops


def count_attended_keys(model: ModelShape, seq_length: int) -> float:
    """Keys that a position of a sequence sees, on average over its positions, itself among them.

    Of a model whose layers are all alike: see ModelShape.split_kinds. Causal: (seq_length + 1) / 2 without a window.
    Masks of packed documents are not looked at.
    """
    window = model.sliding_window
    if window is None or window.num_tokens >= seq_length:
        return (seq_length + 1) / 2
    size = window.num_tokens
    triangle = size * (size + 1) // 2  # keys seen by the first `size` positions
    if window.is_chunked:
        num_chunks, rest = divmod(seq_length, size)
        return (num_chunks * triangle + rest * (rest + 1) // 2) / seq_length
    return (triangle + (seq_length - size) * size) / seq_length
