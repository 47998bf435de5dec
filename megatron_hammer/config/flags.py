"""The flags of a command line by Megatron's attribute names: a read-only view for the checks of single flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Attributes whose flag is not the attribute with dashes.
FLAG_NAMES = {
    "add_bias_linear": "disable-bias-linear",
    "bias_gelu_fusion": "no-bias-gelu-fusion",
    "fp4": "fp4-format",
    "fp8": "fp8-format",
    "layernorm_epsilon": "norm-epsilon",
    "requested_world_size": "world-size",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """values: of every flag, with the defaults of preset and platform. typed: names that are on the command line."""

    values: Mapping[str, Any]
    typed: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def list_loud(self, quiet_values: Mapping[str, tuple[object, ...]]) -> list[str]:
        """Names whose value is not one of its quiet ones. A flag that this Megatron does not have is quiet."""
        return [name for name, quiet in quiet_values.items() if self.values.get(name, quiet[0]) not in quiet]


def flag_of(name: str) -> str:
    """The flag of an attribute, without its leading dashes: num_layers -> num-layers."""
    return FLAG_NAMES.get(name, name.replace("_", "-"))


def show_value(value: object) -> str:
    """A flag's value in a message."""
    return "on" if value is True else "off" if value is False else str(value)
