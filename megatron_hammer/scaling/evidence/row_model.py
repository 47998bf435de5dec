"""The model of a published row: its cells, and public configurations where a cell is blank.

Every value that is not the row's own is written down as an assumption. A model that is neither in the row nor known by
its name is refused with the reason.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.evidence.run_table import PublishedRow

DEFAULT_HEAD_DIM = 128
DEFAULT_GPT_VOCAB_SIZE = 51_200  # GPT-2's 50,257 as Megatron pads them: arXiv 2104.04473, section 5
NOTABLE_SIZE_DIFFERENCE_RATIO = 0.05


class UnpredictableError(Exception):
    """A row that does not say enough; its text is the reason. Never leaves read_runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """A model by a pattern of its name. What is None or 0 is not known of the whole family and must be in the row."""

    pattern: str  # searched in the name, lower case
    source: str
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None  # None: multi-head attention
    ffn: int | None = None
    vocab: int | None = None
    activation: Literal["swiglu", "gelu_tanh"] = "gelu_tanh"
    is_tied: bool = True
    has_bias: bool = True
    has_rope: bool = False


def _llama(
    pattern: str,
    source: str,
    shape: tuple[int, int, int, int, int, int],
    *,
    is_tied: bool = False,
    has_bias: bool = False,
) -> KnownModel:
    """shape: layers, hidden, heads, kv heads, ffn, vocabulary."""
    layers, hidden, heads, kv_heads, ffn, vocab = shape
    return KnownModel(
        pattern=pattern, source=source, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn,
        vocab=vocab, activation="swiglu", is_tied=is_tied, has_bias=has_bias, has_rope=True,
    )  # fmt: skip


def _gpt(pattern: str, source: str, shape: tuple[int, int, int], vocab: int = DEFAULT_GPT_VOCAB_SIZE) -> KnownModel:
    """shape: layers, hidden, heads. Multi-head attention, GELU over four times the hidden size."""
    layers, hidden, heads = shape
    return KnownModel(
        pattern=pattern, source=source, layers=layers, hidden=hidden, heads=heads, kv_heads=heads, ffn=4 * hidden,
        vocab=vocab,
    )  # fmt: skip


def _nemotron(pattern: str, source: str, shape: tuple[int, int, int, int]) -> KnownModel:
    """shape: layers, hidden, heads, kv heads. Squared ReLU: two matrices in the feed-forward, as with GELU."""
    layers, hidden, heads, kv_heads = shape
    return KnownModel(
        pattern=pattern, source=source, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=4 * hidden,
        vocab=256_000, is_tied=False, has_bias=False, has_rope=True,
    )  # fmt: skip


_SC21 = "arXiv 2104.04473, table 1"
_NANOTRON = "huggingface/nanotron scripts/scaling_benchmarks.py"
_LLAMA1 = "arXiv 2302.13971, table 2 and the published config.json"
_LLAMA2 = "meta-llama/Llama-2-*-hf config.json"
_LLAMA3 = "arXiv 2407.21783, table 3 and meta-llama config.json"
_LAUNCHER = "NVIDIA/NeMo-Framework-Launcher launcher_scripts/conf/training"
_MPT = "mosaicml/llm-foundry scripts/train/yamls/pretrain"
_GPT3 = "arXiv 2005.14165, table 2.1"
_QWEN = "Qwen config.json"

# First match wins, so a narrower pattern stands before a wider one.
KNOWN_MODELS: tuple[KnownModel, ...] = (
    _llama(r"^llama-1\.34b", _NANOTRON, (16, 2048, 32, 32, 8192, 131_072), is_tied=True),
    _llama(r"^llama-3\.57b", _NANOTRON, (28, 3072, 32, 32, 8192, 131_072), is_tied=True),
    _llama(r"^llama-8\.86b", _NANOTRON, (32, 4096, 32, 32, 14336, 131_072)),
    _llama(r"^llama-80\.0b", _NANOTRON, (80, 8192, 64, 64, 28672, 131_072)),
    _llama(r"llama-?3\.2-?1b", _LLAMA3, (16, 2048, 32, 8, 8192, 128_256), is_tied=True),
    _llama(r"llama-?3\.2-?3b", _LLAMA3, (28, 3072, 24, 8, 8192, 128_256), is_tied=True),
    _llama(r"llama-?3(\.[13])?-?8b", _LLAMA3, (32, 4096, 32, 8, 14336, 128_256)),
    _llama(r"llama-?3(\.[13])?-?70b", _LLAMA3, (80, 8192, 64, 8, 28672, 128_256)),
    _llama(r"llama-?3(\.[13])?-?405b", _LLAMA3, (126, 16384, 128, 8, 53248, 128_256)),
    _llama(r"llama-?2-?7b", _LLAMA2, (32, 4096, 32, 32, 11008, 32_000)),
    _llama(r"llama-?2-?13b", _LLAMA2, (40, 5120, 40, 40, 13824, 32_000)),
    _llama(r"llama-?2-?70b", _LLAMA2, (80, 8192, 64, 8, 28672, 32_000)),
    _llama(r"open-llama-?13b", "s-JoL/Open-Llama README_en.md", (40, 5120, 40, 40, 13824, 100_000)),
    _llama(r"^llama-?(6\.7|7)b", _LLAMA1, (32, 4096, 32, 32, 11008, 32_000)),
    _llama(r"^llama-?13b", _LLAMA1, (40, 5120, 40, 40, 13824, 32_000)),
    _llama(r"^llama-?3[03]b", _LLAMA1, (60, 6656, 52, 52, 17920, 32_000)),
    _llama(r"^llama-?65b", _LLAMA1, (80, 8192, 64, 64, 22016, 32_000)),
    _llama(r"internlm-?7b", "internlm/internlm-7b config.json", (32, 4096, 32, 32, 11008, 103_168), has_bias=True),
    _llama(r"smollm3", "HuggingFaceTB/SmolLM3-3B config.json", (36, 2048, 16, 4, 11008, 128_256), is_tied=True),
    _llama(r"smollm2?-1\.7b", "HuggingFaceTB/SmolLM-1.7B config.json", (24, 2048, 32, 32, 8192, 49_152), is_tied=True),
    _llama(r"mistral-?7b", "mistralai/Mistral-7B-v0.1 config.json", (32, 4096, 32, 8, 14336, 32_000)),
    _llama(r"qwen2\.5-?7b", _QWEN, (28, 3584, 28, 4, 18944, 152_064)),
    _llama(r"qwen2\.5-?32b", _QWEN, (64, 5120, 40, 8, 27648, 152_064)),
    _llama(r"qwen2\.5-?72b", _QWEN, (80, 8192, 64, 8, 29568, 152_064)),
    _llama(r"olmo-?2-?32b", "allenai/OLMo-2-0325-32B config.json", (64, 5120, 40, 8, 27648, 100_352)),
    _nemotron(r"nemotron-?4-?340b", "arXiv 2406.11704, table 1", (96, 18432, 96, 8)),
    _nemotron(r"nemotron-?4?-?15b", "arXiv 2402.16819, section 2", (32, 6144, 48, 8)),
    _nemotron(r"nemotron-?(3-?)?8b", f"{_LAUNCHER}/nemotron/nemotron_8b.yaml", (32, 4096, 32, 32)),
    _nemotron(r"nemotron-?22b", f"{_LAUNCHER}/nemotron/nemotron_22b.yaml", (40, 6144, 48, 48)),
    _gpt(r"mpt-?125m", _MPT, (12, 768, 12), 50_368),
    _gpt(r"mpt-?350m", _MPT, (24, 1024, 16), 50_368),
    _gpt(r"mpt-?760m", _MPT, (24, 1536, 12), 50_368),
    _gpt(r"mpt-?1b", _MPT, (24, 2048, 16), 50_368),
    _gpt(r"mpt-?3b", _MPT, (32, 2560, 20), 50_368),
    _gpt(r"mpt-?7b", _MPT, (32, 4096, 32), 50_368),
    _gpt(r"mpt-?13b", _MPT, (40, 5120, 40), 50_368),
    _gpt(r"mpt-?30b", _MPT, (48, 7168, 56), 50_368),
    _gpt(r"mpt-?70b", _MPT, (80, 8192, 64), 50_368),
    _gpt(r"mt-?nlg", "arXiv 2201.11990, section 2", (105, 20480, 128)),
    _gpt(r"gpt-?3?-?175b", _GPT3, (96, 12288, 96)),
    _gpt(r"gpt-?3-?20b", f"{_LAUNCHER}/gpt3/20b.yaml", (44, 6144, 48)),
    _gpt(r"gpt-?3-?40b", f"{_LAUNCHER}/gpt3/40b.yaml", (48, 8192, 64)),
    _gpt(r"gpt-?3?-?5b", f"{_LAUNCHER}/gpt3/5b.yaml", (24, 4096, 32)),
    _gpt(r"gpt-?3-?13b", _GPT3, (40, 5120, 40)),
    _gpt(r"gpt-?3-?6\.7b", _GPT3, (32, 4096, 32)),
    _gpt(r"gpt-?3-?2\.7b", _GPT3, (32, 2560, 32)),
    _gpt(r"bloom-?176b|^bloom$", "arXiv 2211.05100, table 3", (70, 14336, 112), 250_880),
    _gpt(r"neox-?20b", "arXiv 2204.06745, table 1", (44, 6144, 64), 50_432),
    _gpt(r"opt-?175b", "arXiv 2205.01068, table 1", (96, 12288, 96), 50_272),
    _gpt(r"^gpt-?1\.7b", _SC21, (24, 2304, 24)),
    _gpt(r"^gpt-?3\.6b", _SC21, (30, 3072, 32)),
    _gpt(r"^gpt-?7\.5b", _SC21, (36, 4096, 32)),
    _gpt(r"^gpt-?18(\.4)?b", _SC21, (40, 6144, 48)),
    _gpt(r"^gpt-?39(\.1)?b", _SC21, (48, 8192, 64)),
    _gpt(r"^gpt-?76(\.1)?b", _SC21, (60, 10240, 80)),
    _gpt(r"^gpt-?145(\.6)?b", _SC21, (80, 12288, 96)),
    _gpt(r"^gpt-?310(\.1)?b", _SC21, (96, 16384, 128)),
    _gpt(r"^gpt-?5(29\.6|30)b", _SC21, (105, 20480, 128)),
    _gpt(r"^gpt-?(1t|1008b)", _SC21, (128, 25600, 160)),
    _gpt(r"^gpt-?22b", "arXiv 2205.05198, table 3", (48, 6144, 64)),
    _gpt(r"gpt-?2-?1558m", "openai-community/gpt2-xl config.json", (48, 1600, 25), 50_257),
    KnownModel(
        pattern=r"starcoder2-?3b", source="bigcode/starcoder2-3b config.json", layers=30, hidden=3072, heads=24,
        kv_heads=2, ffn=12288, vocab=49_152, has_rope=True,
    ),
    # The MFU that the table gives comes out with 6 * 12 * layers * hidden^2 of exactly these two shapes.
    _gpt(r"^2\.7b$", f"{_GPT3}, as the row's MFU confirms", (32, 2560, 32), 50_304),
    _gpt(r"^6\.7b$", f"{_GPT3}, as the row's MFU confirms", (32, 4096, 32), 50_304),
)  # fmt: skip
# What is known of a family where the very model is not: only how its layers are built.
FAMILIES: tuple[KnownModel, ...] = (
    KnownModel(
        pattern=r"llama|internlm|mistral|qwen|smollm|olmo|hammer|baichuan|yi-|deepseek|gemma",
        source="the family's public configurations",
        activation="swiglu", is_tied=False, has_bias=False, has_rope=True,
    ),
    KnownModel(
        pattern=r"nemotron", source="arXiv 2402.16819: squared ReLU, which is two matrices as GELU", is_tied=False,
        has_bias=False, has_rope=True, vocab=256_000,
    ),
    KnownModel(pattern=r"gpt.*untied", source="the row's name", is_tied=False),
    KnownModel(pattern=r"gpt|megatron|bloom|opt", source="Megatron-LM's GPT: GELU, biases, tied embeddings"),
)  # fmt: skip
MOE_PATTERN = re.compile(r"mixtral|moe|\d+x\d+b|a\d+(\.\d+)?b|deepseek-?v[23]|grok")


def build_row_model(row: PublishedRow) -> tuple[ModelShape, tuple[str, ...]]:
    """The model of a row and what was assumed of it. Raises UnpredictableError where the row does not say enough."""
    preset = _find_preset(row)
    if preset is not None:
        return preset, (f"model {preset.name}: the preset of this name ({preset.source})",)
    name = row.model.lower()
    if MOE_PATTERN.search(name):
        raise UnpredictableError("its model has experts, whose sizes the table has no columns for")
    known = next((model for model in KNOWN_MODELS if re.search(model.pattern, name)), None)
    family = known or next((model for model in FAMILIES if re.search(model.pattern, name)), None)
    assumptions: list[str] = []
    shape = _fill_shape(row, known, family, assumptions)
    if row.layers is not None and known is not None and known.layers not in (None, row.layers):
        assumptions.append(f"{row.layers} layers as the row has them, a proxy of the {known.layers} of its name")
    model = _build_model(row, shape, family, assumptions)
    _note_size(row, model, assumptions)
    return model, tuple(assumptions)


def _find_preset(row: PublishedRow) -> ModelShape | None:
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
    row: PublishedRow, known: KnownModel | None, family: KnownModel | None, assumptions: list[str]
) -> dict[str, int]:
    """layers, hidden, heads, kv_heads, ffn and vocab: the row's, else the known model's, else by a stated rule."""
    shape: dict[str, int] = {}
    for name in ("layers", "hidden"):
        value = getattr(row, name) or (getattr(known, name) if known else None)
        if value is None:
            raise UnpredictableError(f"{name} is blank and the model {row.model!r} is not known by its name")
        shape[name] = value
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
    """(value, reason) of a size that neither row nor name gives."""
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


def _build_model(
    row: PublishedRow, shape: dict[str, int], family: KnownModel | None, assumptions: list[str]
) -> ModelShape:
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


def _note_size(row: PublishedRow, model: ModelShape, assumptions: list[str]) -> None:
    if row.params_b is None:
        return
    counted = count_parameters(model) / 1e9
    if abs(counted / row.params_b - 1) > NOTABLE_SIZE_DIFFERENCE_RATIO:
        assumptions.append(f"{counted:.2f} B parameters as built, where the row says {row.params_b:g} B")
