"""config.json and generation_config.json of a Hugging Face folder, read and written by the rows of its family.

The file is data: transformers is not imported, and no code of the folder runs. Fields that change the computation in a
way that no mapping expresses are refused by name, all at once. Absent fields have transformers' defaults.
`rope_theta` and `torch_dtype` are written as transformers 4 and other engines spell them; transformers 5 reads both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
from megatron_hammer.checkpoint.hugging_face.families.catalogue import FAMILIES, select_family
from megatron_hammer.checkpoint.hugging_face.family import ConfigFamily, Family
from megatron_hammer.checkpoint.hugging_face.unmapped_families import explain_absence
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.typed import read_json
from megatron_hammer.model.shape import ModelShape, MoeShape

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class HfModel:
    """What config.json says; `family` has the rows and the class that an export of this model gets."""

    shape: ModelShape
    dropout: Dropout
    family: Family
    dtype: str | None  # "bfloat16", "float16", "float32"; None where the file does not say
    config: dict[str, Any]


def read_hf_model(path: Path) -> HfModel:
    """The model of a Hugging Face folder, or of a config.json under any name; it is named like the folder or the file.

    Raises ConversionError naming every field that cannot be converted.
    """
    config, name = read_named_config(path)
    shape, dropout = interpret_config(config, name=name, source=str(path))
    # transformers 5 writes dtype, version 4 wrote torch_dtype. "auto" is an option of loading and says nothing.
    dtype = config.get("dtype") or config.get("torch_dtype")
    return HfModel(
        shape=shape,
        dropout=dropout,
        family=select_family(shape, preferred=config["model_type"]),
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) and dtype != "auto" else None,
        config=config,
    )


def read_named_config(path: Path) -> tuple[dict[str, Any], str]:
    """config.json of a folder, or of the file itself, and the name of its model; as read_hf_model."""
    # A preset may be a config.json under a name of its own.
    has_own_name = path.is_file() and path.name != CONFIG_NAME
    config_path = path if path.is_file() else path / CONFIG_NAME
    if not config_path.is_file():
        raise ConversionError(f"{config_path}: must exist, got none. Pass a Hugging Face model folder.")
    return read_config(config_path), path.stem if has_own_name else config_path.resolve().parent.name


def read_config(path: Path) -> dict[str, Any]:
    """The content of a JSON file of the folder; raises ConversionError where it is not one object."""
    return read_json(path, dict[str, Any], remedy="Fetch the file again.", raises=ConversionError)


def interpret_config(
    config: Mapping[str, Any],
    *,
    name: str = "model",
    source: str = CONFIG_NAME,
    families: Mapping[str, ConfigFamily] = FAMILIES,
) -> tuple[ModelShape, Dropout]:
    """What a config.json that was read describes; raises ConversionError naming every unsupported field.

    name, source: of the ModelShape. families: those that are accepted, by their model_type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise ConversionError(
            f"config.json, model_type: must be one of {', '.join(sorted(families))}, got model_type={model_type!r}: "
            f"{explain_absence(config)}. Use a model of one of these families."
        )
    family = families[model_type]
    fields = HfFields(config)
    fields.require_class(family.hf_classes, is_known_code=family.has_own_code or family.began_with_own_code)
    fields.require_nothing_else(family.own_fields)
    if not family.has_experts:
        fields.require_no_experts()
    values: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size"),
        "init_method_std": fields.number("initializer_range", 0.02),
        "has_tied_embeddings": fields.flag("tie_word_embeddings", family.is_tied_by_default),
        **family.constants,
    }
    for row in family.config:
        values |= row.read(fields)
    # Wrong fields have been replaced by values that are valid, so that all problems are found before any is raised.
    moe = MoeShape(**_select(values, "moe")) if family.has_experts else None
    if moe is not None:
        _require_router(fields, moe)
    fields.raise_problems()
    shape = ModelShape(name=name, source=source, moe=moe, **_select(values, ""))
    return shape, Dropout(**{"hidden": 0.0} | _select(values, "dropout"))


# Beside what the rows of a family read. transformers_version and _name_or_path are about the file and not the model.
_WRITTEN_ANEW = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
_LEFT_OUT = {
    "auto_map": "it names code of the source's folder, which this folder does not bring",
    "custom_pipelines": "it names code of the source's folder, which this folder does not bring",
}


class _ReadFields(dict[str, Any]):
    """A config.json that remembers which of its fields were asked for."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.names_read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names_read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names_read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.names_read.add(str(name))
        return super().__contains__(name)


def list_other_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that say nothing of the architecture, such as ids and settings; and those lost, with the reason.

    A field belongs to the architecture if reading the model asks for it. Raises ConversionError as `interpret_config`.
    """
    fields = _ReadFields(config)
    interpret_config(fields)
    left_out = {name: reason for name, reason in _LEFT_OUT.items() if config.get(name)}
    others = config.keys() - fields.names_read - _WRITTEN_ANEW - _LEFT_OUT.keys()
    return {name: value for name, value in config.items() if name in others}, left_out


def _select(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The values that belong to ModelShape (owner ""), MoeShape ("moe") or Dropout ("dropout")."""
    split = {tuple(target.rpartition(".")[::2]): value for target, value in values.items()}
    return {name: value for (found, name), value in split.items() if found == owner}


def _require_router(fields: HfFields, moe: MoeShape) -> None:
    if moe.router_topk > moe.num_experts:
        fields.refuse("num_experts_per_tok", f"there are {moe.num_experts} experts")
    elif moe.router_topk == 1 and moe.is_topk_renormalized:
        fields.refuse("num_experts_per_tok", "megatron-core refuses to renormalise the weight of a single expert")
    elif moe.router_topk > 1 and moe.score_function != "softmax" and not moe.is_topk_renormalized:
        fields.refuse("norm_topk_prob", "megatron-core always divides the scores of several experts by their sum")


def build_config(
    family: Family, model: ModelShape, dropout: Dropout, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """config.json of `model`; dtype: "bfloat16", "float16" or "float32"."""
    config = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.has_tied_embeddings,
        "use_cache": True,
    }
    for row in family.config:
        config |= row.write(model, dropout)
    return config


def build_generation_config(*, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """generation_config.json: which ids begin and end a text, where the tokenizer says so."""
    # Pretraining pads nothing, so the tokenizer has no pad token. generate() needs one for batches and takes the end.
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}
