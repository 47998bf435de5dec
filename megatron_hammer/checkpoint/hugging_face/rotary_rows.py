"""Two orders of the rows of q and k: a pair of pure functions, each the other's exact inverse.

Megatron and most classes of transformers rotate dimension i of a head together with i + d/2. Helium, and llama.cpp's
arch `llama`, rotate neighbours, 2i with 2i + 1, as Meta's own code does. The same model therefore has its rows in
another order there.
"""

from torch import Tensor

from megatron_hammer.errors import ConversionError


def permute_rope(weight: Tensor, *, num_heads: int) -> Tensor:
    """Interleave the two halves of every head's rows; exact inverse of `unpermute_rope`.

    weight: [n * d, ...] of q or k, weight or bias, n heads of d rows each; row d/2 of a head becomes its row 1.
    Contiguous, dtype unchanged, no arithmetic. Raises ConversionError unless every head has an even number of rows.
    Source: LLAMA_ROPE_TYPE_NORM of llama.cpp's arch llama; pinned by tests/numerics/test_gguf_vs_llama_cpp.py.
    """
    return _exchange_axes(weight, num_heads=num_heads, is_stored_in_halves=True)


def unpermute_rope(weight: Tensor, *, num_heads: int) -> Tensor:
    """Put the even rows of every head before the odd ones: transformers' order; exact inverse of `permute_rope`."""
    return _exchange_axes(weight, num_heads=num_heads, is_stored_in_halves=False)


def _exchange_axes(weight: Tensor, *, num_heads: int, is_stored_in_halves: bool) -> Tensor:
    num_rows, rest = weight.shape[0], weight.shape[1:]
    if num_rows % (2 * num_heads) or num_rows == 0:
        raise ConversionError(
            f"rope: rows must be an even number for each head, got rows={num_rows}, heads={num_heads}. "
            "Check num_attention_heads, num_key_value_heads and head_dim."
        )
    # The two axes (which half, which row of it) change places; in halves the half is the outer one, in pairs the inner.
    half = num_rows // num_heads // 2
    pairs = (2, half) if is_stored_in_halves else (half, 2)
    return weight.reshape(num_heads, *pairs, *rest).transpose(1, 2).reshape(num_rows, *rest).contiguous()
