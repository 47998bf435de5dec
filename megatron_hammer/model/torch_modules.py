"""The two modules that the `torch` backend swaps into megatron's layers: a norm and the core attention.

Both follow the interfaces of megatron's own (`LayerNormBuilder`, `CoreAttention`) and need nothing but PyTorch; only a
norm that returns the residual too is a Triton kernel of ours.
Context parallelism is left to the `te` backend; preflight refuses it here. Sequences that hold several conversations
have a mask here, and their boundaries in `te` (te_attention.py).
"""

import contextlib
import functools
import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

NORM_CLASSES: dict[str, Any] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


class _ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that stores its weight less 1 (--apply-layernorm-1p). TransformerEngine adds the 1 in fp32, as here."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1, self.eps).to(x)


class _ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """The same of LayerNorm."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float() + 1, self.bias.float()
        return torch.nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x)


ZERO_CENTERED_CLASSES: dict[str, Any] = {"RMSNorm": _ZeroCenteredRMSNorm, "LayerNorm": _ZeroCenteredLayerNorm}


class TorchNorm:
    """Build torch's RMSNorm or LayerNorm as `config.normalization` says (or `normalization`, where given).

    megatron's WrappedTorchNorm refuses sequence parallelism because it does not mark its parameters; here they carry
    `sequence_parallel`, so that megatron all-reduces their gradients over the tensor-parallel group.

    has_residual: the norm's input is the residual too. With `config.fused_residual_rmsnorm` the norm then returns both
    (model/kernels/rms_norm.py). PyTorch's RMSNorm, which is one kernel each way on a GPU, serves everywhere else.
    """

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        normalization: str | None = None,
        has_residual: bool = False,
        **_: Any,
    ) -> torch.nn.Module:
        # The norm on the embedding's output, the only one with a class of its own, is always a plain one.
        is_plain = normalization is not None or not config.layernorm_zero_centered_gamma
        norm_class = (NORM_CLASSES if is_plain else ZERO_CENTERED_CLASSES)[normalization or config.normalization]
        if has_residual and config.fused_residual_rmsnorm:
            from megatron_hammer.model.kernels.rms_norm import RmsNormWithResidual  # needs triton

            norm_class = RmsNormWithResidual
        norm: torch.nn.Module = norm_class(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class TorchNormOfResidual:
    """`TorchNorm` in front of attention or MLP: its input is the residual too."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        return TorchNorm(config, hidden_size, eps, has_residual=True)


@functools.lru_cache(maxsize=2)
def build_window_mask(
    sequence: int, window: int, dtype: torch.dtype, device: torch.device, *, has_null_key: bool
) -> Tensor:
    """What is added to the scores [s, s]: 0 where a position sees itself and the `window` positions before it.

    One tensor for all layers and micro-batches, because autograd keeps the mask of each. In the dtype of the queries:
    PyTorch would make one of that dtype out of booleans for each layer. has_null_key: [s + 1, s + 1], with a key in
    front that all positions see.
    """
    forbidden = torch.ones(sequence, sequence, dtype=torch.bool, device=device).tril().triu(-window).logical_not_()
    if has_null_key:
        forbidden = _put_null_key_in_front(forbidden)
    return torch.zeros(forbidden.shape, dtype=dtype, device=device).masked_fill_(forbidden, -math.inf)


@functools.lru_cache(maxsize=2)
def build_score_mask(forbidden: Tensor, window: int | None, dtype: torch.dtype, *, has_null_key: bool) -> Tensor:
    """The same of a mask [b or 1, 1, s, s] that is True where attention is forbidden, and of a window if there is one.

    Cached for the layers of a micro-batch, as above.
    """
    if has_null_key:
        forbidden = _put_null_key_in_front(forbidden)
    if window is None:
        return torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device).masked_fill_(forbidden, -math.inf)
    sequence = forbidden.shape[-1] - int(has_null_key)
    mask = build_window_mask(sequence, window, dtype, forbidden.device, has_null_key=has_null_key)
    return mask.masked_fill(forbidden, -math.inf)


def _put_null_key_in_front(forbidden: Tensor) -> Tensor:
    """[..., s, s] to [..., s + 1, s + 1]: nobody is forbidden the first key, and the first query nothing."""
    return torch.nn.functional.pad(forbidden, (1, 0, 1, 0), value=False)


class SdpaAttention(MegatronModule):
    """Causal attention by torch.nn.functional.scaled_dot_product_attention, with grouped queries and sliding windows.

    query [s, b, n, d]; key and value [s, b, g, d], where n is a multiple of g (all three already split over the
    tensor-parallel group). Returns [s, b, n * d]. Its softmax is the plain one, or --softmax-type off-by-one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("SdpaAttention has no context parallelism; preflight must have refused it.")
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # --apply-query-key-layer-scaling changes nothing: megatron's softmax multiplies back what it divides here.
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # Of the pair only what lies before a position counts: preflight refuses any but 0 after it.
        self.window: int | None = config.window_size[0] if has_window else None
        if config.softmax_type == "learnable":
            raise ValueError("SdpaAttention has no learned sinks; preflight must have refused them.")
        # That softmax adds 1 to its denominator, as a key of zeros does, whose score is 0; its value adds nothing.
        self.has_null_key = config.softmax_type == "off-by-one"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """attention_mask: [b or 1, 1, s, s], True where attention is forbidden; None means causal."""
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SdpaAttention takes no attention bias and no packed sequences; use the te backend.")
        sequence, batch, heads, head_dim = query.shape
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = self._build_mask(query, attention_mask)
        if self.has_null_key:
            # In front, where causal attention shows it to all positions; the query beside it is dropped below.
            query, key, value = (torch.nn.functional.pad(tensor, (0, 0, 1, 0)) for tensor in (query, key, value))
        if query.is_cuda and heads != key.shape[1] and (query.dtype == torch.float32 or mask is not None):
            # No fused kernel of PyTorch takes grouped heads in fp32 or with a mask: scores of all pairs would be kept,
            # 94 GB for hammer-1b4. With a copy of key and value for each head, the memory-efficient kernel does.
            key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
        dropout_ratio = self.attention_dropout if self.training else 0.0
        with _attention_rng(dropout_ratio):
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout_ratio,
                scale=self.softmax_scale,
                enable_gqa=heads != key.shape[1],
            )
        if self.has_null_key:
            context = context[:, :, 1:]
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * head_dim)

    def _build_mask(self, query: Tensor, forbidden: Tensor | None) -> Tensor | None:
        """What scaled_dot_product_attention takes as attn_mask: None for causal attention to everything before.

        query: [b, n, s, d]; forbidden: as attention_mask of `forward`.
        """
        sequence = query.shape[2]
        window = None if self.window is None or self.window >= sequence - 1 else self.window
        if forbidden is not None:
            return build_score_mask(forbidden, window, query.dtype, has_null_key=self.has_null_key)
        if window is None:
            return None
        return build_window_mask(sequence, window, query.dtype, query.device, has_null_key=self.has_null_key)


def _attention_rng(dropout_ratio: float) -> contextlib.AbstractContextManager[None]:
    """Heads on different tensor-parallel ranks must drop different entries: draw from the model-parallel RNG."""
    if dropout_ratio == 0.0:
        return contextlib.nullcontext()
    return tensor_parallel.get_cuda_rng_tracker().fork()
