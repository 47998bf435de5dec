"""The architecture that a Hugging Face folder's config.json describes: the inverse of `write_config.py`.

The file is read as data: transformers is not imported, and no code of the folder runs. Fields that change the
computation in a way that no mapping expresses are refused by name, all at once; `config_fields.py` lists them. Absent
fields have transformers' defaults. Dropout and the initial standard deviation are read for a run that continues.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.saved_model import Architecture
from megatron_hammer.checkpoint.hugging_face.tensor_rows import Family, select_family
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import MoeShape

CONFIG_NAME = "config.json"
# megatron's gelu with its bias fused is the tanh approximation, which transformers spells in several ways.
GELU_TANH_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfModel:
    """What config.json says; `family` has the rows and the class that an export of this architecture gets."""

    architecture: Architecture
    family: Family
    dtype: str | None  # "bfloat16", "float16", "float32"; None where the file does not say
    config: dict[str, Any]


def read_hf_model(path: Path) -> HfModel:
    """The model of a Hugging Face folder, or of a config.json under any name.

    Raises ConversionError naming every field that cannot be converted.
    """
    config = _read_config(path if path.is_file() else path / CONFIG_NAME)
    architecture = interpret_config(config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return HfModel(
        architecture=architecture,
        family=select_family(architecture),
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) and dtype != "auto" else None,
        config=config,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: must exist, got none. Pass a Hugging Face model folder.") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: must be readable JSON, got {error}. Fetch the file again.") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: must hold one JSON object, got {type(config).__name__}. Fetch the file again.")
    return config


def interpret_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json that was read; raises ConversionError naming every unsupported field."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DIALECTS:
        raise ConversionError(
            f"config.json, model_type: must be one of {', '.join(sorted(DIALECTS))}, got model_type={model_type!r}. "
            "Use a model of one of these families."
        )
    dialect = DIALECTS[model_type]
    fields = HfFields(config)
    fields.require_class(dialect.hf_classes, runs_own_code=dialect.has_own_code)
    fields.require_nothing_else()
    architecture = dialect.interpret(fields)
    fields.raise_problems()
    return architecture


def _interpret_llama(fields: HfFields) -> Architecture:
    has_bias = fields.flag("attention_bias", False)
    if has_bias != fields.flag("mlp_bias", False):
        fields.refuse("attention_bias", "Megatron biases every linear layer or only q, k and v; mlp_bias differs")
    fields.require_no_window(default=None)
    return _llama_body(fields, has_linear_bias=has_bias, has_qkv_bias=has_bias, may_lack_groups=True)


def _interpret_tinyllm(fields: HfFields) -> Architecture:
    """tiny-llm-zh: Llama with biases on q, k and v, under Llama's names.

    Source: wdndev/tiny-llm-zh, train/configuration_tinyllm.py and train/modeling_tinyllm.py.
    """
    fields.require_no_window(default=None)
    return _llama_body(fields, has_qkv_bias=True, may_lack_groups=True)


def _interpret_mistral(fields: HfFields) -> Architecture:
    fields.require_no_window(default=4096)
    return _llama_body(fields)


def _interpret_qwen2(fields: HfFields) -> Architecture:
    fields.require_no_switched_window()
    return _llama_body(fields, has_qkv_bias=True)


def _interpret_qwen3(fields: HfFields) -> Architecture:
    fields.require_no_switched_window()
    fields.require_false("attention_bias", "a bias on o_proj without one on the MLP is not mapped")
    return _llama_body(fields, default_head_dim=128, has_qk_norm=True)


def _interpret_mixtral(fields: HfFields) -> Architecture:
    """Its router's softmax goes over the chosen experts."""
    fields.require_no_window(default=None)
    moe = MoeShape(
        num_experts=fields.num_experts(),
        router_topk=fields.count("num_experts_per_tok"),
        ffn_hidden_size=fields.count("intermediate_size"),
        is_topk_renormalized=True,
        aux_loss_coeff=fields.number("router_aux_loss_coef", 0.001),
    )
    return _llama_body(fields, default_rope_theta=1e6, default_epsilon=1e-5, moe=moe)


def _interpret_qwen2_moe(fields: HfFields) -> Architecture:
    fields.require_no_switched_window(has_layer_choice=False)
    moe = _qwen_experts(fields, shared_expert_size=fields.count("shared_expert_intermediate_size"))
    return _llama_body(fields, has_qkv_bias=fields.flag("qkv_bias", True), moe=moe)


def _interpret_qwen3_moe(fields: HfFields) -> Architecture:
    fields.require_no_switched_window(has_layer_choice=False)
    fields.require_false("attention_bias", "a bias on o_proj without one on the experts is not mapped")
    return _llama_body(fields, has_qk_norm=True, moe=_qwen_experts(fields, shared_expert_size=0))


def _qwen_experts(fields: HfFields, *, shared_expert_size: int) -> MoeShape:
    return MoeShape(
        num_experts=fields.num_experts(),
        router_topk=fields.count("num_experts_per_tok"),
        ffn_hidden_size=fields.count("moe_intermediate_size"),
        shared_expert_intermediate_size=shared_expert_size,
        has_shared_expert_gate=shared_expert_size > 0,
        is_topk_renormalized=fields.flag("norm_topk_prob", False),
        aux_loss_coeff=fields.number("router_aux_loss_coef", 0.001),
    )


def _llama_body(
    fields: HfFields,
    *,
    has_linear_bias: bool = False,
    has_qkv_bias: bool = False,
    has_qk_norm: bool = False,
    default_head_dim: int | None = None,
    default_rope_theta: float = 10_000.0,
    default_epsilon: float = 1e-6,
    may_lack_groups: bool = False,
    moe: MoeShape | None = None,
) -> Architecture:
    """What Llama and its descendants share."""
    hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    fields.require_choice("hidden_act", ("silu", "swish"), default="silu")
    rope = fields.rope(default_rope_theta)
    if moe is None:
        fields.require_no_experts()
    elif moe.router_topk > moe.num_experts:
        fields.refuse("num_experts_per_tok", f"there are {moe.num_experts} experts")
    elif moe.router_topk == 1 and moe.is_topk_renormalized:
        fields.refuse("num_experts_per_tok", "megatron-core refuses to renormalise the weight of a single expert")
    return Architecture(
        num_layers=fields.count("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=fields.count("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=fields.query_groups(heads, may_be_absent=may_lack_groups),
        head_dim=fields.head_dim(hidden_size, heads, default=default_head_dim),
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=fields.count("max_position_embeddings"),
        normalization="RMSNorm",
        norm_epsilon=fields.number("rms_norm_eps", default_epsilon),
        activation="swiglu",
        position_embedding_type="rope",
        rotary_base=rope.base,
        has_linear_bias=has_linear_bias,
        has_qkv_bias=has_qkv_bias,
        has_tied_embeddings=fields.flag("tie_word_embeddings", False),
        has_embedding_norm=False,
        init_method_std=fields.number("initializer_range", 0.02),
        attention_dropout=fields.number("attention_dropout", 0.0),
        hidden_dropout=0.0,
        moe=moe,
        has_qk_norm=has_qk_norm,
        rope_scaling=rope.scaling,
        rotary_seq_len_interpolation_factor=rope.interpolation_factor,
    )


def _interpret_gpt2(fields: HfFields) -> Architecture:
    hidden_size, heads = fields.count("n_embd"), fields.count("n_head")
    activation = fields.require_choice("activation_function", (*GELU_TANH_NAMES, "gelu"), default="gelu_new")
    if not fields.flag("scale_attn_weights", True):
        fields.refuse("scale_attn_weights", "Megatron divides the scores by the root of the head's width")
    fields.require_false("scale_attn_by_inverse_layer_idx", "a scale of each layer's own is not mapped")
    fields.require_false("add_cross_attention", "cross attention is not mapped")
    fields.require_no_experts()
    return Architecture(
        num_layers=fields.count("n_layer"),
        hidden_size=hidden_size,
        ffn_hidden_size=fields.count("n_inner", default=4 * hidden_size),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=fields.head_dim(hidden_size, heads, must_fill=True),
        vocab_size=fields.count("vocab_size"),
        max_position_embeddings=fields.count("n_positions"),
        normalization="LayerNorm",
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh" if activation in GELU_TANH_NAMES else "gelu_erf",
        position_embedding_type="learned_absolute",
        rotary_base=10_000,
        has_linear_bias=True,
        has_qkv_bias=True,
        has_tied_embeddings=fields.flag("tie_word_embeddings", True),
        has_embedding_norm=False,
        init_method_std=fields.number("initializer_range", 0.02),
        attention_dropout=fields.number("attn_pdrop", 0.1),
        hidden_dropout=fields.number("resid_pdrop", 0.1),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """How one model_type of transformers spells its architecture."""

    hf_classes: tuple[str, ...]
    interpret: Callable[[HfFields], Architecture]
    has_own_code: bool = False  # the class lives in the folder; known here by its published source


DIALECTS: dict[str, Dialect] = {
    "gpt2": Dialect(hf_classes=("GPT2LMHeadModel",), interpret=_interpret_gpt2),
    "llama": Dialect(hf_classes=("LlamaForCausalLM", "LLaMAForCausalLM"), interpret=_interpret_llama),
    "mistral": Dialect(hf_classes=("MistralForCausalLM",), interpret=_interpret_mistral),
    "mixtral": Dialect(hf_classes=("MixtralForCausalLM",), interpret=_interpret_mixtral),
    "qwen2": Dialect(hf_classes=("Qwen2ForCausalLM",), interpret=_interpret_qwen2),
    "qwen2_moe": Dialect(hf_classes=("Qwen2MoeForCausalLM",), interpret=_interpret_qwen2_moe),
    "qwen3": Dialect(hf_classes=("Qwen3ForCausalLM",), interpret=_interpret_qwen3),
    "qwen3_moe": Dialect(hf_classes=("Qwen3MoeForCausalLM",), interpret=_interpret_qwen3_moe),
    "tinyllm": Dialect(hf_classes=("TinyllmForCausalLM",), interpret=_interpret_tinyllm, has_own_code=True),
}
