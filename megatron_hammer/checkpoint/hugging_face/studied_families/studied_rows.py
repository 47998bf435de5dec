"""Rows of config.json in families that are read and never written."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow


def read_only(read: Callable[[HfFields], Mapping[str, Any]]) -> ConfigRow:
    """A row that says what the file sets, and writes nothing."""
    return ConfigRow(read, lambda model, _: {})


def require_absent(fields: HfFields, name: str, reason: str) -> Mapping[str, Any]:
    """Refuse a field of another architecture, which would change what is counted."""
    if fields.has_value(name, None):
        fields.refuse(name, reason)
    return {}


def require_number(fields: HfFields, name: str, value: float, reason: str) -> None:
    """Refuse another value than the one that every model of the class has."""
    if fields.number(name, value) != value:
        fields.refuse(name, reason)
