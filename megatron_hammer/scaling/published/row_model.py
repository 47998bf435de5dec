"""The model of a table row: its cells, and public configurations for the blank cells (models.toml).

Every value that does not come from the row is recorded as an assumption. A model that is neither described in the row
nor known by its name is refused with the reason.
"""

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml, validate
from megatron_hammer.model.accounting import count_active_parameters, count_parameters
from megatron_hammer.model.shape import LatentAttention, ModelShape, MoeShape, SlidingWindow
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.presets.preset import Preset
from megatron_hammer.scaling.plan import Text
from megatron_hammer.scaling.published.run_table import RunRow

MODELS_PATH = Path(__file__).parent / "models.toml"
DEFAULT_HEAD_DIM = 128
DEFAULT_GPT_VOCAB_SIZE = 51_200  # GPT-2's 50,257 as Megatron pads them: arXiv 2104.04473, section 5
# Of a model with experts as built and as its row states it, which has three digits or fewer.
LARGEST_SIZE_DIFFERENCE_RATIO = 0.02
# Of a dense model, whose stated size is often its name: Llama-3.2-1B has 1.24 billion. Beyond it is another model.
LARGEST_NAMED_SIZE_DIFFERENCE_RATIO = 0.25
LLAMA4_CHUNK_TOKENS = 8192  # attention_chunk_size of meta-llama/Llama-4-*
# What a row's notes say about its layers -> why its time cannot be predicted.
_REFUSALS = (
    (r"hybrid.?mamba|mamba2", "its model is a hybrid of Mamba and attention, which is not modelled"),
    (r"sparse attention", "its sparse attention is not modelled"),
    (r"known [\w-]+ regression", "its publication names a regression of this release"),
)


class UnpredictableError(Exception):
    """A row does not say enough; the text is the reason. The functions that read tables catch it for each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """A model by a pattern of its name. A size that is None must be in the row: it differs within the family."""

    pattern: str  # searched in the name, lower case
    source: Text
    style: str = ""
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None  # None: multi-head attention
    ffn: int | None = None
    vocab: int | None = None
    activation: Literal["swiglu", "gelu_tanh", "clamped_swiglu"]
    is_tied: bool
    has_bias: bool
    has_rope: bool
    has_sinks: bool = False


@dataclass(frozen=True, slots=True)
class KnownModels:
    """The content of models.toml, in its order. Each model has the fields of its style filled in."""

    model: tuple[KnownModel, ...]
    family: tuple[KnownModel, ...]


@functools.cache
def load_known_models() -> KnownModels:
    remedy = "Correct it there."
    content = read_toml(MODELS_PATH, dict[str, Any], remedy=remedy, raises=ConfigError)
    styles = content["style"]
    merged = {name: [styles[row["style"]] | row for row in content[name]] for name in ("model", "family")}
    return validate(
        merged, KnownModels, where=str(MODELS_PATH), remedy=remedy, raises=ConfigError, allows_unknown=False
    )


# Besides names: "8x7b" is experts x size, and "a3b" the parameters that are active for a token. The latter is a word of
# its own, or follows the size as in "30ba3b". Names of dense models end in the same letters: llama7b, gemma2b.
MOE_PATTERN = re.compile(
    r"mixtral|moe|\d+x\d+b|(?<![a-z])(\d+b)?a\d+(\.\d+)?b|deepseek-?v[234]|grok|gpt-?oss|llama-?4|kimi-?k2"
)


def build_row_model(row: RunRow) -> tuple[ModelShape, tuple[str, ...]]:
    """The model of a row, and what was assumed about it. Raises UnpredictableError if the row does not say enough."""
    preset = _find_preset(row)
    if preset is not None:
        return preset, (f"model {preset.name}: the preset of this name ({preset.source})",)
    name = row.model.lower()
    _refuse_unmodelled_layers(row)
    if row.experts is None and MOE_PATTERN.search(name):
        raise UnpredictableError("its model has experts, and its row does not say how many")
    if row.experts is not None:
        return _build_expert_model(row)
    listed = load_known_models()
    known = next((model for model in listed.model if re.search(model.pattern, name)), None)
    family = known or next((model for model in listed.family if re.search(model.pattern, name)), None)
    assumptions: list[str] = []
    shape = _fill_shape(row, known, family, assumptions)
    if row.layers is not None and known is not None and known.layers not in (None, row.layers):
        assumptions.append(f"{row.layers} layers as the row has them, a proxy of the {known.layers} of its name")
    model = _build_model(row, shape, family, assumptions)
    if known is None or not _has_widths_of(row, known, shape["hidden"]):
        model = _tie_as_stated(row, model, assumptions)
    _refuse_other_sizes(row, model, LARGEST_NAMED_SIZE_DIFFERENCE_RATIO)
    return model, tuple(assumptions)


def _find_preset(row: RunRow) -> ModelShape | None:
    """The preset that the row names in any spelling (LLaMA-3_8B is llama3-8b), unless a cell states another size."""
    preset = _list_preset_spellings().get(_drop_spelling(row.model))
    if preset is None:
        return None
    model = preset.model
    sizes = {
        "layers": model.num_layers, "hidden": model.hidden_size, "heads": model.num_attention_heads,
        "kv_heads": model.num_query_groups, "ffn": model.ffn_hidden_size, "vocab": model.vocab_size,
    }  # fmt: skip
    if model.moe is not None:
        sizes |= {
            "experts": model.moe.num_experts, "topk": model.moe.router_topk, "moe_ffn": model.moe.ffn_hidden_size,
        }  # fmt: skip
    elif row.experts is not None:
        return None
    return model if all(getattr(row, name) in (None, size) for name, size in sizes.items()) else None


_PRESET_SPELLINGS = {"hammerllm-1.4b": "hammer-1b4"}


def _drop_spelling(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


@functools.cache
def _list_preset_spellings() -> dict[str, Preset]:
    """The presets by their names without case and separators."""
    names = {name: name for name in PRESETS} | _PRESET_SPELLINGS
    return {_drop_spelling(spelling): PRESETS[name] for spelling, name in names.items()}


def _fill_shape(
    row: RunRow, known: KnownModel | None, family: KnownModel | None, assumptions: list[str]
) -> dict[str, int]:
    """layers, hidden, heads, kv_heads, ffn and vocab: from the row, else the known model, else by a stated rule."""
    shape: dict[str, int] = {}
    for name in ("layers", "hidden"):
        value = getattr(row, name) or (getattr(known, name) if known else None)
        if value is None:
            raise UnpredictableError(f"{name} is blank and the model {row.model!r} is not known by its name")
        shape[name] = value
    is_known_width = known is not None and _has_widths_of(row, known, shape["hidden"])
    for name in ("heads", "kv_heads", "ffn", "vocab"):
        value = getattr(row, name)
        if value is None and known is not None and (is_known_width or name == "vocab"):
            value = getattr(known, name)
            if value is not None:
                assumptions.append(f"{name} {value}: {known.source}")
        if value is None:
            value, reason = _fill_by_rule(name, shape, family)
            assumptions.append(f"{name} {value}: {reason}")
        shape[name] = value
    if shape["heads"] % shape["kv_heads"]:
        raise UnpredictableError(f"its {shape['kv_heads']} kv heads do not divide its {shape['heads']} heads")
    return shape


def _has_widths_of(row: RunRow, known: KnownModel, hidden: int) -> bool:
    """Whether no stated width is another than the known model's. A row with one of its own is another model.

    MegaScale's 175B (arXiv 2402.15627, table 1) has GPT-3's hidden size with 128 heads, and so not its 96 kv heads.
    """
    stated = {"heads": row.heads, "ffn": row.ffn, "hidden": hidden}
    return all(size is None or getattr(known, name) in (None, size) for name, size in stated.items())


def _fill_by_rule(name: str, shape: dict[str, int], family: KnownModel | None) -> tuple[int, str]:
    """(value, reason) for a size that neither the row nor its model name gives."""
    if name == "heads":
        if shape["hidden"] % DEFAULT_HEAD_DIM:
            raise UnpredictableError(f"heads is blank and hidden {shape['hidden']} is no multiple of 128")
        return shape["hidden"] // DEFAULT_HEAD_DIM, f"blank, a head of {DEFAULT_HEAD_DIM}"
    if name == "kv_heads":
        return shape["heads"], "blank, multi-head attention"
    if name == "vocab":
        if family is not None and family.activation == "swiglu":
            raise UnpredictableError("vocab is blank and the model is not known by its name")
        return family.vocab if family and family.vocab else DEFAULT_GPT_VOCAB_SIZE, "blank, the family's"
    if family is not None and family.activation == "swiglu":
        raise UnpredictableError("ffn is blank and the model is not known by its name")
    return 4 * shape["hidden"], "blank, four times hidden"


def _build_model(row: RunRow, shape: dict[str, int], family: KnownModel | None, assumptions: list[str]) -> ModelShape:
    if family is None:
        is_gated = shape["ffn"] != 4 * shape["hidden"]
        rule = "swiglu, as ffn is not four times hidden" if is_gated else "gelu, as ffn is four times hidden"
        family = KnownModel(
            pattern="", source="rule", activation="swiglu" if is_gated else "gelu_tanh", is_tied=not is_gated,
            has_bias=not is_gated, has_rope=is_gated,
        )  # fmt: skip
        assumptions.append(f"activation {rule}")
    head_dim, rest = divmod(shape["hidden"], shape["heads"])
    if row.head_dim is not None:
        head_dim = row.head_dim
    elif rest:
        raise UnpredictableError(f"its {shape['heads']} heads do not divide hidden {shape['hidden']}")
    model = ModelShape(
        name=row.model,
        source=row.source,
        num_layers=shape["layers"],
        hidden_size=shape["hidden"],
        ffn_hidden_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_query_groups=shape["kv_heads"],
        vocab_size=shape["vocab"],
        max_position_embeddings=row.seq or 2048,
        normalization="LayerNorm" if family.activation == "gelu_tanh" else "RMSNorm",
        activation=family.activation,
        position_embedding_type="rope" if family.has_rope else "learned_absolute",
        has_linear_bias=family.has_bias,
        has_attention_sinks=family.has_sinks,
        has_tied_embeddings=family.is_tied,
        kv_channels=head_dim,
    )
    return model


def _tie_as_stated(row: RunRow, model: ModelShape, assumptions: list[str]) -> ModelShape:
    """The model with its embeddings tied or not as the stated size says, where only the family is known."""
    if row.params_b is None:
        return model
    other = replace(model, has_tied_embeddings=not model.has_tied_embeddings)
    gap, other_gap = (abs(count_parameters(one) / 1e9 - row.params_b) for one in (model, other))
    if gap < 0.005 * row.params_b or other_gap > gap / 2:
        return model
    assumptions.append(f"{'tied' if other.has_tied_embeddings else 'untied'} embeddings: params_B {row.params_b:g}")
    return other


def _refuse_other_sizes(row: RunRow, model: ModelShape, allowed_ratio: float) -> None:
    """Raise UnpredictableError if the model as built has other sizes than the row states: it is another model.

    What a token is computed with may be stated with or without its row of the input embedding. A dense row states none.
    """
    active, embedding = count_active_parameters(model), model.vocab_size * model.hidden_size
    for kind, stated, counted in (
        ("", row.params_b, (count_parameters(model),)),
        ("active ", row.params_active_b if model.moe is not None else None, (active, active - embedding)),
    ):
        if stated is not None and all(abs(number / 1e9 / stated - 1) > allowed_ratio for number in counted):
            raise UnpredictableError(
                f"its model has {counted[0] / 1e9:.4g} B {kind}parameters as built, the row says {stated:g} B"
            )


# SwiGLU, RMSNorm, a rope and an untied head: every published model with experts that is not refused, except GPT-OSS.
EXPERT_FAMILY = KnownModel(
    pattern="", source="the columns of experts", activation="swiglu", is_tied=False, has_bias=False, has_rope=True
)


def _build_expert_model(row: RunRow) -> tuple[ModelShape, tuple[str, ...]]:
    """The model of a row that has the columns for experts: nothing is filled from its name."""
    assumptions: list[str] = []
    if row.dense_layers and row.ffn is None:
        raise UnpredictableError("ffn is blank, the width of its dense layers")
    # ModelShape's ffn_hidden_size is that of dense layers, and has no effect without them.
    families = (one for one in load_known_models().family if re.search(one.pattern, row.model.lower()))
    family = next((one for one in families if one.has_sinks), EXPERT_FAMILY)
    shape = _fill_shape(replace(row, ffn=row.ffn or row.moe_ffn), None, family, assumptions)
    latent = _build_latent_attention(row) if row.attention.lower() == "mla" else None
    if latent is not None:
        shape["kv_heads"] = shape["heads"]
    model = _build_model(row, shape, family, assumptions)
    model = replace(
        model,
        latent_attention=latent,
        kv_channels=None if latent else model.kv_channels,
        has_qk_norm=latent is not None,
        moe=_build_experts(row, shape["layers"]),
        sliding_window=_read_sliding_window(row, shape["layers"]),
    )
    # Published sizes leave out the layers that predict further tokens.
    _refuse_other_sizes(row, model, LARGEST_SIZE_DIFFERENCE_RATIO)
    return replace(model, num_mtp_layers=row.mtp_layers or 0), tuple(assumptions)


def _build_latent_attention(row: RunRow) -> LatentAttention:
    blank = [name for name in ("kv_lora", "qk_head", "v_head", "rope_head") if getattr(row, name) is None]
    if blank:
        raise UnpredictableError(f"its attention is latent, and {' and '.join(blank)} blank")
    sizes: Any = row  # none of them is None
    return LatentAttention(
        q_lora_rank=row.q_lora,
        kv_lora_rank=sizes.kv_lora,
        qk_head_dim=sizes.qk_head,
        qk_pos_emb_head_dim=sizes.rope_head,
        v_head_dim=sizes.v_head,
    )


def _refuse_unmodelled_layers(row: RunRow) -> None:
    """Raise UnpredictableError for a row whose notes name layers that no model of this package has."""
    text = row.notes.lower()
    for pattern, reason in _REFUSALS:
        if re.search(pattern, text):
            raise UnpredictableError(reason)


def _build_experts(row: RunRow, num_layers: int) -> MoeShape:
    """The experts of a row that has the columns for them. Raises UnpredictableError if one of them is blank."""
    blank = [name for name in ("experts", "topk", "moe_ffn") if getattr(row, name) is None]
    if blank:
        raise UnpredictableError(f"its model has experts, and {' and '.join(blank)} blank")
    assert row.experts is not None
    assert row.topk is not None
    assert row.moe_ffn is not None
    return MoeShape(
        num_experts=row.experts,
        router_topk=row.topk,
        ffn_hidden_size=row.moe_ffn,
        shared_expert_intermediate_size=row.shared_ffn or 0,
        dense_layers=_list_dense_layers(row, num_layers),
    )


def _list_dense_layers(row: RunRow, num_layers: int) -> tuple[int, ...]:
    """The first ones, as DeepSeek has them; every second one where half of many layers are dense, as in Llama 4."""
    number = row.dense_layers or 0
    if number >= num_layers:
        raise UnpredictableError(f"all of its {num_layers} layers are dense, and it has experts")
    if number and 2 * number == num_layers:
        # interleave_moe_layer_step = 2 of meta-llama/Llama-4-Maverick: layers 1, 3, 5, ... are mixtures.
        return tuple(range(0, num_layers, 2))
    return tuple(range(number))


def _read_sliding_window(row: RunRow, num_layers: int) -> SlidingWindow | None:
    """The window that a row's notes name: of every second layer (GPT-OSS), or the chunks of Llama 4."""
    text = row.notes.lower()
    match = re.search(r"alternate layers use (\d+)-token sliding-window", text)
    if match is not None:
        return SlidingWindow(num_tokens=int(match[1]), layers=tuple(range(0, num_layers, 2)))
    if "chunked local attention in 3 of 4 layers" in text:
        layers = tuple(layer for layer in range(num_layers) if layer % 4 != 3)
        return SlidingWindow(num_tokens=LLAMA4_CHUNK_TOKENS, layers=layers, is_chunked=True)
    return None
