"""Phi-3: a Llama that keeps q, k and v in one tensor, gate and up in another, and may turn a share of each head."""

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, number, unwritten, write_value
from megatron_hammer.checkpoint.hugging_face.families.llama import (
    HF_LAYER,
    LAYER,
    LLAMA_REQUIREMENTS,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import FUSED_QKV
from megatron_hammer.checkpoint.hugging_face.tensor_rows import build_rows
from megatron_hammer.checkpoint.hugging_face.window_rows import IN_EVERY_LAYER, WINDOW, window_in_every_layer


def _require_plain_rope(fields: HfFields) -> None:
    fields.require_no_rope_scaling("transformers takes it for longrope, whose frequencies change with the length")


_MLP = build_rows(
    (LAYER + "mlp.linear_fc1.layer_norm_weight", "h", HF_LAYER + "post_attention_layernorm.weight"),
    (LAYER + "mlp.linear_fc1.weight", "2f h", HF_LAYER + "mlp.gate_up_proj.weight"),
    (LAYER + "mlp.linear_fc2.weight", "h f", HF_LAYER + "mlp.down_proj.weight"),
)

PHI3 = Family(
    model_type="phi3",
    hf_classes=("Phi3ForCausalLM",),
    began_with_own_code=True,
    config=(
        *llama_config(may_lack_groups=True, has_partial_rope=True, default_epsilon=1e-5),
        # Phi3Model has no dropout of the embedding, whatever the file says.
        ConfigRow(lambda fields: {}, write_value("embd_pdrop", "dropout.hidden")),
        number("resid_pdrop", "dropout.hidden", 0.0),
        unwritten(_require_plain_rope),
        window_in_every_layer(default=None),
    ),
    features=WINDOW | {"rotary_percent"},
    own_fields=frozenset({"partial_rotary_factor"}),
    list_tensors=lambda model: list_llama_tensors(model, _MLP, qkv_name="self_attn.qkv_proj", qkv_layout=FUSED_QKV),
    is_candidate=lambda model: not model.has_qkv_bias,
    requirements=(
        *LLAMA_REQUIREMENTS,
        IN_EVERY_LAYER,
        Requirement(
            lambda model: model.rope_scaling is None and model.rotary_seq_len_interpolation_factor is None,
            "rotary_percent with a scaled rope",
            "Phi3Config takes every scaling but longrope for a mistake",
        ),
    ),
)
