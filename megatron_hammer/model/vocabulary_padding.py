"""The rows that pad a vocabulary for tensor parallelism are no tokens, and no loss may count them as if they were.

Megatron's loss does: at a vocabulary of 1,000 padded to 1,024 an untrained model starts 0.02 nats too high. Here they
are masked in every run, without a flag, for four reasons: a continued run starts at the loss that transformers
computes; the loss does not depend on the padding, which grows with tensor parallelism; no gradient reaches the padding
rows, so that cutting them off in an export changes nothing; and nothing is to be remembered from run to run. A run
begun where they counted has pushed their logits down, and goes on at the same loss but for what probability they keep.
"""

import torch
from torch import Tensor


def mask_padding_logits(logits: Tensor, *, num_tokens: int, tp_rank: int) -> None:
    """Overwrite the columns of `logits` that stand for no token with the least number of its type, in place.

    logits: [s, b, p / tp], this rank's equal part of the padded vocabulary; num_tokens: of the whole, without padding.
    Every kind of cross entropy then gives them a probability of exactly 0, and so the gradient 0: what autograd would
    add to this assignment is known to be zeros, and it is not told, which saves a copy of the logits' gradient.
    Finite, because an online softmax (TransformerEngine's) of a rank with nothing but -inf is NaN.
    """
    width = logits.shape[-1]
    first_padding = min(max(num_tokens - tp_rank * width, 0), width)
    if first_padding < width:
        with torch.no_grad():
            logits[..., first_padding:].fill_(torch.finfo(logits.dtype).min)
