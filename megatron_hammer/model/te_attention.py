"""TransformerEngine's attention within each of the conversations that share a sequence.

Its kernels for that take all sequences of a micro-batch as one, [t, heads, d]. Megatron would have the whole model
compute on that shape, which pipeline stages do not exchange where a micro-batch has several sequences. Here only
attention sees it. Importing this file needs TransformerEngine.
"""

import dataclasses
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class PackedTEAttention(TEDotProductAttention):  # type: ignore[misc]
    """query [s, b, n, d], key and value [s, b, g, d]; returns [s, b, n * d].

    packed_seq_params: boundaries in the b * s positions, sequence after sequence, in a format other than "thd", so that
    megatron leaves the shapes to this class; under context parallelism those of the whole sequences.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, None, **options)
        sequence, batch = query.shape[:2]
        query, key, value = (x.transpose(0, 1).reshape(sequence * batch, *x.shape[2:]) for x in (query, key, value))
        boundaries = dataclasses.replace(packed_seq_params, qkv_format="thd")
        context = super().forward(query, key, value, None, attn_mask_type, attention_bias, boundaries, **options)
        return context.view(batch, sequence, -1).transpose(0, 1)
