"""The rows that a family's config.json is made of: each reads and writes one field of the file.

A row reads into fields of `ModelShape`, of `MoeShape` (spelt "moe.num_experts") or of `Dropout` ("dropout.hidden").
`config_json.py` puts these together; `config_fields.py` reads a single field and keeps what is wrong with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout:
    """What a config.json says beside the shape: the probability that an element is dropped in training."""

    attention: float
    hidden: float


@dataclass(frozen=True, slots=True)
class ConfigRow:
    """read: the fields that the file sets, by their names; write: what the file says, {} for nothing."""

    read: Callable[[HfFields], Mapping[str, Any]]
    write: Callable[[ModelShape, Dropout], Mapping[str, Any]]


def write_value(name: str, target: str) -> Callable[[ModelShape, Dropout], Mapping[str, Any]]:
    """Writes the field that a row calls `target` as it is."""
    owner, _, field = target.rpartition(".")
    # The part before the dot names the object that holds the field.
    owners = {"": lambda model, _: model, "moe": lambda model, _: model.moe, "dropout": lambda _, dropout: dropout}
    return lambda model, dropout: {name: getattr(owners[owner](model, dropout), field)}


def count(name: str, target: str) -> ConfigRow:
    """A positive whole number that must be there."""
    return ConfigRow(lambda fields: {target: fields.count(name)}, write_value(name, target))


def number(name: str, target: str, default: float) -> ConfigRow:
    """A number that is not negative."""
    return ConfigRow(lambda fields: {target: fields.number(name, default)}, write_value(name, target))


def multiplier(name: str, target: str) -> ConfigRow:
    """A positive number."""
    return ConfigRow(lambda fields: {target: fields.multiplier(name)}, write_value(name, target))


def flag(name: str, target: str, default: bool) -> ConfigRow:
    """True or false."""
    return ConfigRow(lambda fields: {target: fields.flag(name, default)}, write_value(name, target))


def fixed(name: str, value: Any, require: Callable[[HfFields], object]) -> ConfigRow:
    """A field that says the same of every model; `require` refuses other values."""
    return ConfigRow(_read_nothing(require), lambda model, dropout: {name: value})


def unwritten(require: Callable[[HfFields], object]) -> ConfigRow:
    """Fields whose default in transformers is right; `require` refuses other values."""
    return ConfigRow(_read_nothing(require), lambda model, dropout: {})


def _read_nothing(require: Callable[[HfFields], object]) -> Callable[[HfFields], Mapping[str, Any]]:
    def read(fields: HfFields) -> Mapping[str, Any]:
        require(fields)
        return {}

    return read


def always_off(name: str, reason: str) -> ConfigRow:
    """A switch that is written as false and refused as true."""
    return fixed(name, False, lambda fields: fields.require_false(name, reason))


def read_kv_channels(head_dim: int, *, hidden_size: int, heads: int) -> dict[str, int | None]:
    """`ModelShape` spells out only a width of heads that do not fill hidden_size."""
    return {"kv_channels": None if head_dim * heads == hidden_size else head_dim}
