"""What multi-latent attention keeps between its input norm and core attention, and what recomputing that frees.

Source: megatron.core MLASelfAttention with TransformerEngine's linears; tests/numerics/test_latent_activations.py holds
it against the tensors that autograd keeps of that module.
"""

from megatron_hammer.model.memory.options import MemoryOptions
from megatron_hammer.model.memory.widths import Widths
from megatron_hammer.model.shape import ModelShape


def count_latents(model: ModelShape, options: MemoryOptions, widths: Widths) -> tuple[float, float]:
    """(bytes of compressed states, queries, keys and values; of these, what --recompute-modules mla_up_proj gives up).

    Each tensor-parallel rank compresses the tokens that it holds. A compressed state is kept where its norm takes it
    in, and normed where the linear behind takes it in; the channels of the rope travel with the keys' state. The keys
    of a head are joined of two parts, and values are copied, so nothing of the linears' outputs is kept.
    """
    latent = model.latent_attention
    assert latent is not None
    element, linear = options.element_bytes, options.linear_input_bytes
    ranks = (latent.q_lora_rank or 0) + latent.kv_lora_rank
    heads = widths.tokens * element * (widths.queries + widths.key_values + widths.values)
    states = widths.sequence_tokens * element * (ranks + latent.qk_pos_emb_head_dim)
    if not model.has_qk_norm:
        # The linears keep the states themselves, or quantized copies of them.
        quantized = widths.sequence_tokens * linear * ranks
        return heads + (states if linear == element else quantized), heads if options.is_recomputed(
            "mla_up_proj"
        ) else 0
    normed = widths.sequence_tokens * linear * ranks
    return heads + states + normed, heads + normed if options.is_recomputed("mla_up_proj") else 0


def count_quantized_inputs(options: MemoryOptions, num_linears: int) -> int:
    """Copies of one tensor that linears keep as their input: the tensor itself, or what each of them quantized."""
    return num_linears if options.linear_input_bytes < options.element_bytes else 1
