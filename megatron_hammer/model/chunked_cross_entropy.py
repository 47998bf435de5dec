"""The loss of a micro-batch in chunks of tokens: only one chunk has logits at a time.

Each chunk is a checkpoint: its logits are computed once for the loss and again in the backward pass, which is a third
more arithmetic in the output layer. It stands in the place of torch.nn.functional.linear_cross_entropy, whose loss has
the type of the hidden states: two or three digits in bf16. benchmarks/RESULTS.md has the measured errors of both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hammer.model.memory.options import CHUNK_TOKENS


def compute_loss_in_chunks(
    *,
    hidden_states: Tensor,
    labels: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    scale_logits: Any,
    compute_language_model_loss: Any,
    **_: Any,
) -> Tensor:
    """Loss [b, s] of labels [b, s]: an output_processor of megatron's GPTModel, instead of output layer and loss.

    hidden_states: [s, b, h], of the whole sequence. output_weight: the embedding's where they share it, else None.
    """

    def compute_chunk(hidden_states: Tensor, labels: Tensor) -> Tensor:
        logits, _ = output_layer(hidden_states, weight=output_weight)
        loss: Tensor = compute_language_model_loss(labels, scale_logits(logits))
        return loss

    # A checkpoint gives the backward pass the weight without megatron's attributes. If its gradient were added to
    # main_grad there, autograd would have none, and megatron's overlapped reduction stops at a parameter without one.
    output_layer.gradient_accumulation_fusion = False
    size = max(1, CHUNK_TOKENS // hidden_states.shape[1])
    chunks = zip(hidden_states.split(size), labels.split(size, dim=1), strict=True)
    # No random numbers: nothing in a chunk drops out.
    losses = [checkpoint(compute_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(losses, dim=1)
