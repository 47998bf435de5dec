"""The rows that pad a vocabulary for tensor parallelism are no tokens, and the loss must not count them.

Megatron's loss counts them: at a vocabulary of 1,000 padded to 1,024 an untrained model starts 0.02 nats too high. Here
they are masked in every run, without a flag, for three reasons. A continued run starts at the loss that transformers
computes. The loss does not depend on the padding, which grows with tensor parallelism. No gradient reaches the padding
rows, so removing them in an export changes nothing. A run that was begun without the mask has learned low logits for
these rows; it continues at the same loss, less the small probability that they still have.
"""

import torch
from torch import Tensor


def mask_padding_logits(logits: Tensor, *, num_tokens: int, tp_rank: int) -> None:
    """Overwrite the columns of `logits` that stand for no token with the smallest number of its type, in place.

    logits: [s, b, p / tp], this rank's equal part of the padded vocabulary; num_tokens: of the whole, without padding.
    Every kind of cross entropy then gives them a probability of exactly 0, and so the gradient 0. The assignment is
    hidden from autograd, which would only add zeros for it; this saves a copy of the logits' gradient. The number is
    finite, because an online softmax (TransformerEngine's) of a rank with nothing but -inf is NaN.
    """
    width = logits.shape[-1]
    first_padding = min(max(num_tokens - tp_rank * width, 0), width)
    if first_padding < width:
        with torch.no_grad():
            logits[..., first_padding:].fill_(torch.finfo(logits.dtype).min)
