"""What each transformer layer is made of, for the `te` and the `torch` backend of the same model.

Both give the same checkpoint names: TransformerEngine fuses the norm in front of a linear layer into it
(`self_attention.linear_qkv.layer_norm_weight`), and the torch layers map their separate norms to those names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_hammer.model.torch_modules import SdpaAttention, TorchNorm, TorchNormOfResidual

Backend = Literal["te", "torch"]


class TorchSpecProvider(LocalSpecProvider):
    """megatron's own parallel linear layers, with torch's norm and attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return TorchNormOfResidual if has_residual else TorchNorm

    def core_attention(self) -> type:
        return SdpaAttention


def build_layer_spec(
    config: TransformerConfig,
    backend: Backend,
    *,
    is_mixture: bool = True,
    residual_multiplier: float = 1.0,
    is_packed: bool = False,
) -> ModuleSpec:
    """The spec of one layer. is_mixture: False for a dense layer of a model that has experts in others."""
    num_experts = config.num_moe_experts if is_mixture else None
    spec = (_build_te_layer_spec if backend == "te" else _build_torch_layer_spec)(config, num_experts)
    if is_packed and backend == "te":
        # Imported only where it is used: TransformerEngine is not installed where the torch backend runs.
        from megatron_hammer.model.te_attention import PackedTEAttention

        spec.submodules.self_attention.submodules.core_attention = PackedTEAttention
    if residual_multiplier != 1.0:
        spec.submodules.self_attn_bda = spec.submodules.mlp_bda = _scale_residual_branch(residual_multiplier)
    return spec


def _scale_residual_branch(multiplier: float) -> Callable[[bool, bool], Any]:
    """megatron's sum of a layer's output, its bias and the residual, with the first two multiplied before it."""

    # A function: megatron's build_module would import anything else that is no class.
    def select_sum(is_training: bool, is_fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(is_training, is_fused)

        def add_scaled(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout_ratio: float) -> Tensor:
            scaled = tuple(None if part is None else part * multiplier for part in output)
            total: Tensor = add(scaled, residual, dropout_ratio)
            return total

        return add_scaled

    return select_sum


def _build_te_layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """Everything that megatron's own GPTModelConfig passes (megatron/training/models/gpt.py): what is left out here is
    accepted as a flag and then ignored.
    """
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        qk_l2_norm=config.qk_l2_norm,
        use_te_op_fuser=config.use_transformer_engine_op_fuser,
        use_kitchen=config.use_kitchen,
        use_te_activation_func=config.use_te_activation_func,
        use_kitchen_attention=config.use_kitchen_attention,
        kitchen_attention_backend=config.kitchen_attention_backend,
        mla_down_proj_fusion=getattr(config, "mla_down_proj_fusion", False),  # a field of MLATransformerConfig
        use_grouped_gemm_for_dense_mlp=config.use_grouped_gemm_for_dense_mlp,
    )


def _build_torch_layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    provider = TorchSpecProvider()
    qk_norm = TorchNorm if config.qk_layernorm else IdentityOp
    norm_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if num_experts is None:
        # A mixture of experts keeps its norm apart in TransformerEngine too.
        norm_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(has_residual=True),
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=provider.layer_norm(has_residual=True),
            mlp=get_mlp_module_spec_for_backend(
                backend=provider, num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=norm_names,
        ),
    )


def build_block_spec(
    config: TransformerConfig,
    backend: Backend,
    vp_stage: int | None = None,
    *,
    residual_multiplier: float = 1.0,
    is_packed: bool = False,
) -> Any:
    """The layers of one pipeline chunk and the norm that ends the last one."""
    build = partial(build_layer_spec, config, backend, residual_multiplier=residual_multiplier, is_packed=is_packed)
    is_mixture = _list_mixtures(config)
    if backend == "te" and all(is_mixture):
        return build(is_mixture=True)  # megatron's block builds TENorm by itself
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    chunk = is_mixture[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    specs = {kind: build(is_mixture=kind) for kind in set(chunk)}
    # Imported by name only where it is used: TransformerEngine is not installed where the torch backend runs.
    norm = TorchNorm if backend == "torch" else _te_norm()
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in chunk], layer_norm=norm)


def _list_mixtures(config: TransformerConfig) -> list[bool]:
    """Of every layer of the model, whether it has experts where the model has any (--moe-layer-freq)."""
    frequency, num_layers = config.moe_layer_freq, config.num_layers
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(num_layers)]
    return [bool(is_moe) for is_moe in frequency]


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
