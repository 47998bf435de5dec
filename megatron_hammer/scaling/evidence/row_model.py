"""The model of a table row: its cells, and public configurations for the blank cells (models.toml).

Every value that does not come from the row is recorded as an assumption. A model that is neither described in the row
nor known by its name is refused with the reason.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml, validate
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.evidence.run_table import RunRow
from megatron_hammer.scaling.plan import Text

MODELS_PATH = Path(__file__).parent / "models.toml"
DEFAULT_HEAD_DIM = 128
DEFAULT_GPT_VOCAB_SIZE = 51_200  # GPT-2's 50,257 as Megatron pads them: arXiv 2104.04473, section 5
NOTABLE_SIZE_DIFFERENCE_RATIO = 0.05


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
    activation: Literal["swiglu", "gelu_tanh"]
    is_tied: bool
    has_bias: bool
    has_rope: bool


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
MOE_PATTERN = re.compile(r"mixtral|moe|\d+x\d+b|(?<![a-z])(\d+b)?a\d+(\.\d+)?b|deepseek-?v[23]|grok")


def build_row_model(row: RunRow) -> tuple[ModelShape, tuple[str, ...]]:
    """The model of a row, and what was assumed about it. Raises UnpredictableError if the row does not say enough."""
    preset = _find_preset(row)
    if preset is not None:
        return preset, (f"model {preset.name}: the preset of this name ({preset.source})",)
    name = row.model.lower()
    if MOE_PATTERN.search(name):
        raise UnpredictableError("its model has experts, whose sizes the table has no columns for")
    listed = load_known_models()
    known = next((model for model in listed.model if re.search(model.pattern, name)), None)
    family = known or next((model for model in listed.family if re.search(model.pattern, name)), None)
    assumptions: list[str] = []
    shape = _fill_shape(row, known, family, assumptions)
    if row.layers is not None and known is not None and known.layers not in (None, row.layers):
        assumptions.append(f"{row.layers} layers as the row has them, a proxy of the {known.layers} of its name")
    model = _build_model(row, shape, family, assumptions)
    _note_size(row, model, assumptions)
    return model, tuple(assumptions)


def _find_preset(row: RunRow) -> ModelShape | None:
    preset = PRESETS.get(row.model.strip()) or PRESETS.get(_PRESET_SPELLINGS.get(row.model.lower(), ""))
    if preset is None:
        return None
    model = preset.model
    sizes = {
        "layers": model.num_layers, "hidden": model.hidden_size, "heads": model.num_attention_heads,
        "kv_heads": model.num_query_groups, "ffn": model.ffn_hidden_size, "vocab": model.vocab_size,
    }  # fmt: skip
    return model if all(getattr(row, name) in (None, size) for name, size in sizes.items()) else None


_PRESET_SPELLINGS = {"hammerllm-1.4b": "hammer-1b4"}


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
    # Heads and ffn belong to a width: a row with another hidden size than its name implies does not take them over.
    is_known_width = known is not None and known.hidden == shape["hidden"]
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
    if rest:
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
        normalization="RMSNorm" if family.activation == "swiglu" else "LayerNorm",
        activation=family.activation,
        position_embedding_type="rope" if family.has_rope else "learned_absolute",
        has_linear_bias=family.has_bias,
        has_tied_embeddings=family.is_tied,
        kv_channels=head_dim,
    )
    return model


def _note_size(row: RunRow, model: ModelShape, assumptions: list[str]) -> None:
    if row.params_b is None:
        return
    counted = count_parameters(model) / 1e9
    if abs(counted / row.params_b - 1) > NOTABLE_SIZE_DIFFERENCE_RATIO:
        assumptions.append(f"{counted:.2f} B parameters as built, where the row says {row.params_b:g} B")
