"""The ends of the model: what embedding, final norm, head and loss hold, on the stages that have them.

Two moments count on the last stage: the loss, with every copy of the logits, and the head's backward pass, with the
gradient of the logits and of the hidden state.
"""

from typing import NamedTuple

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.activations import count_gathered_bytes, count_hidden_bytes
from megatron_hammer.model.memory.options import CHUNK_TOKENS, Batch, CrossEntropy, MemoryOptions
from megatron_hammer.model.parameters import padded_vocab_size
from megatron_hammer.model.shape import ModelShape

# Bytes per logit at the loss, 16-bit logits. in-place: the logits become their own gradient, as those of a chunk do.
# unfused: megatron.core.tensor_parallel.cross_entropy casts to fp32 and works in place from then on (max, exp, softmax,
# gradient); the 16-bit logits, and later their gradient, live beside that copy. native (fused_cross_entropy): its
# compiled parts do not work in place, so there is a second fp32 copy; a recorded peak of Megatron-LM's tests shows it
# (3.9 bytes more). te: the 16-bit logits become their own gradient.
# eager: PyTorch's cross_entropy of logits cast to fp32: the 16-bit logits, the log-softmax, its gradient and that of
# the fp32 logits. compiled: torch.compile fuses the casts, so only the 16-bit logits and their gradient exist.
LOGIT_BYTES: dict[CrossEntropy, int] = {
    "in-place": 2, "chunked": 2, "unfused": 6, "native": 10, "te": 2, "eager": 14, "compiled": 4,
}  # fmt: skip
# Of these, what stays until the backward pass: the loss of a further token waits so long, as the last token's loss is
# computed after it and its backward pass runs first. The fp32 softmax of `unfused` and `native` is one copy.
WAITING_LOGIT_BYTES: dict[CrossEntropy, int] = {
    "in-place": 2, "chunked": 2, "unfused": 4, "native": 4, "te": 2, "eager": 4, "compiled": 2,
}  # fmt: skip
# Hidden states that a layer for further tokens keeps beside its transformer layer: the embeddings that its norm takes,
# two that its projection takes, those of its final norm and of the head. Source: megatron.core
# MultiTokenPredictionLayer.
MTP_HIDDEN_STATES = 5


class HeadMemory(NamedTuple):
    """Bytes of the last stage: logits at the loss and at the head's backward pass, and what else is there."""

    loss_logits: int
    backward_logits: int
    kept: int  # inputs of the final norm and of the head
    loss_transient: int
    backward_transient: int


def estimate_head(model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions) -> HeadMemory:
    """Final norm, head and loss of one micro-batch; rows cut over the context, columns over the tensor ranks."""
    tp = layout.tensor_model_parallel_size
    rows = padded_vocab_size(model.vocab_size, divisible_by=options.vocab_divisible_by, tensor_model_parallel_size=tp)
    num_tokens = batch.count_tokens(layout.context_parallel_size)
    is_chunked = options.cross_entropy == "chunked" and num_tokens > CHUNK_TOKENS
    num_logits = (CHUNK_TOKENS if is_chunked else num_tokens) * (rows // tp)
    element = options.element_bytes
    hidden = count_hidden_bytes(model, layout, batch, options)
    gathered = count_gathered_bytes(model, layout, batch, options)
    backward = gathered or hidden  # the gradient of the head's input, of all tokens of the rank
    if gathered:
        backward += gathered + hidden  # the gathered input and the scattered gradient
    if layout.pipeline_model_parallel_size > 1:
        backward += hidden
    if not options.has_fused_weight_gradients:
        # That of a chunk is added to the sum of those before it.
        backward += (2 if is_chunked else 1) * element * rows // tp * model.hidden_size
    waiting = model.num_mtp_layers * num_logits * (WAITING_LOGIT_BYTES[options.cross_entropy] if element == 2 else 4)
    return HeadMemory(
        # The loss of fp32 logits casts nothing: one copy, in place.
        loss_logits=waiting + num_logits * (LOGIT_BYTES[options.cross_entropy] if element == 2 else 4),
        backward_logits=waiting + num_logits * element,
        kept=(2 + MTP_HIDDEN_STATES * model.num_mtp_layers) * hidden,
        loss_transient=gathered,
        backward_transient=backward,
    )


def count_embedding_bytes(model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions) -> int:
    """What the embedding keeps of one micro-batch: token ids, its dropout mask, the input of its norm."""
    hidden = count_hidden_bytes(model, layout, batch, options)
    dropout_mask = hidden // options.element_bytes if options.has_hidden_dropout else 0
    norm_input = hidden if model.has_embedding_norm else 0
    token_ids = 8 * batch.count_tokens(layout.context_parallel_size)  # int64
    return dropout_mask + norm_input + token_ids
