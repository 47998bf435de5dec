"""Why a model_type of transformers that has no family here cannot be converted: what it computes otherwise.

Source: the modelling code of transformers 5 and, for classes that live in their own repositories, their published code.
A family that is added to families/catalogue.py leaves this table; a test compares the two.
"""

from collections.abc import Mapping
from typing import Any

_MLA = "its attention is multi-latent (MLA): keys and values are made of a compressed state"
_STATE = "some or all of its layers keep a state (Mamba, linear attention, recurrence or convolution) and do not attend"
_SANDWICH = "it has norms behind attention and MLP, beside or in place of those in front"
_PARALLEL = "attention and MLP of a layer work side by side on one input"
_ALIBI = "its positions are ALiBi's biases of the attention scores"
_ENCODER = "it is or has an encoder; only decoders are mapped"
_SQUARED_RELU = "its MLP has no gate, and its activation is the square of a ReLU"
# Megatron's layer has no place for either: norms stand in front, and those of queries and keys are a head wide.
_OLMO = "its norms stand behind attention and MLP and not in front, and one goes over all heads of the queries or keys"
_GEMMA = "its norms multiply by 1 + weight, its embeddings by sqrt(hidden_size), and its gate is a gelu"
_OWN_CODE = "its class is code of its own repository, which is never run"

_REASONS: tuple[tuple[str, str], ...] = (
    (_GEMMA, "gemma vaultgemma"),
    (f"{_GEMMA}; {_SANDWICH}", "gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text"),
    (
        _MLA,
        "deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 kimi_k2 kimi_k25 minicpm3 longcat_flash mistral4 youtu axk1 "
        "glm4_moe_lite",
    ),
    (f"{_MLA}, and chooses the keys that it attends to", "glm_moe_dsa"),
    (_SANDWICH, "exaone4 glm4 afmoe"),
    (_OLMO, "olmo2"),
    (f"{_OLMO}, and a scaled rope turns its layers of full attention alone", "olmo3"),
    ("its norms have no weights", "olmo nanochat"),
    ("its norms of queries and keys have a weight for each head and channel", "olmoe flex_olmo minimax_m2"),
    (_PARALLEL, "cohere cohere2 falcon gpt_neox gptj codegen phi persimmon"),
    (_ALIBI, "bloom mpt"),
    (
        _STATE,
        "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 zaya nemotron_h granitemoehybrid lfm2 lfm2_moe "
        "rwkv xlstm recurrent_gemma qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text kimi_linear minimax "
        "bailing_hybrid olmo_hybrid",
    ),
    (
        _ENCODER,
        "t5 mt5 umt5 bart mbart pegasus led longt5 switch_transformers m2m_100 marian blenderbot t5gemma bert roberta "
        "xlm-roberta albert electra deberta-v2 modernbert eurobert whisper",
    ),
    (_SQUARED_RELU, "arcee jais2 nemotron"),
    ("its activation is xIELU, which learns two numbers for each layer", "apertus"),
    (
        "its attention has a learned sink for each head (Megatron's --softmax-type learnable), its router and experts "
        "have biases, and its gate is clamped and shifted",
        "gpt_oss",
    ),
    ("its attention works within chunks, some of its layers scale queries by position", "llama4 llama4_text"),
    ("its rope turns neighbouring channels of a share of each head", "glm chatglm"),
    ("its rope turns neighbouring channels", "ernie4_5"),
    (
        "its rope turns neighbouring channels, and its router has softmax scores with expert biases, which Megatron "
        "takes beside sigmoid scores alone",
        "ernie4_5_moe",
    ),
    ("its norms are LayerNorm beside a rope", "stablelm starcoder2 phimoe dbrx"),
    ("it has one key and one value for all heads beside learned positions", "gpt_bigcode"),
    ("its attention is local in every other layer and not scaled", "gpt_neo"),
    ("its positions are learned with an offset of 2, and its activation is a ReLU", "opt"),
    ("it norms queries and keys after their rotation", "hunyuan_v1_dense hunyuan_v1_moe"),
    ("its attention is the difference of two", "diffllama"),
    ("its attention mask is computed from the values", "doge"),
    ("its linear layers round weights to three values, with norms between them", "bitnet"),
    ("it keeps all experts of a layer in one tensor under other names, and multiplies its residuals", "granitemoe"),
    ("it has shared experts without a gate, and multiplies its residuals", "granitemoeshared"),
    ("its layers with a window have another rope than the others", "mellum"),
    ("the output of its attention is multiplied by a gate, and its layers differ in their number of heads", "laguna"),
    ("it scales queries by position", "ministral3"),
    ("its rope changes with the length of the text, and o_proj has a bias of its own choice", "internlm3"),
    (_OWN_CODE, "baichuan internlm internlm2 qwen minicpm exaone xverse orion"),
)
_REASON_OF: Mapping[str, str] = {name: reason for reason, names in _REASONS for name in names.split()}
_MULTIMODAL = ("vision_config", "audio_config", "text_config", "thinker_config")


def list_unmapped() -> tuple[str, ...]:
    """The known model_types without a family."""
    return tuple(_REASON_OF)


def explain_absence(config: Mapping[str, Any]) -> str:
    """What the model of this config.json has that no family here has, or that nobody here knows it."""
    model_type = config.get("model_type")
    reason = _REASON_OF.get(model_type) if isinstance(model_type, str) else None
    if reason is not None:
        return reason
    if parts := [name for name in _MULTIMODAL if config.get(name)]:
        return f"it is more than a model of text ({', '.join(parts)})"
    if config.get("is_encoder_decoder"):
        return _ENCODER
    if config.get("auto_map"):
        return _OWN_CODE
    return "nothing is known here of what it computes"
