"""What a family is: one model_type of transformers, with its config.json, its tensors, and the models it computes.

A family is one file in families/ and one entry in families/catalogue.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair, TensorRow, expand_rows
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a model must be for the family's class to compute it. value: what the message shows where it is not."""

    is_met: Callable[[ModelShape], bool]
    value: str | Callable[[ModelShape], str]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model_type of transformers.

    hf_classes: its causal language model, then older spellings. config: the rows of config.json. constants: fields of
    ModelShape that are the same in every model. list_tensors: the rows of its weights. is_candidate: whether a model is
    of this kind; of several candidates, the first in the catalogue is taken. requirements: what a candidate must be.
    """

    model_type: str
    hf_classes: tuple[str, ...]
    config: tuple[ConfigRow, ...]
    list_tensors: Callable[[ModelShape], tuple[TensorRow, ...]]
    is_candidate: Callable[[ModelShape], bool]
    requirements: tuple[Requirement, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    # Without it, a number of experts in config.json is refused: config_fields.require_no_experts.
    has_experts: bool = False
    has_own_code: bool = False  # the class lives in the folder; known here by its published source
    # transformers ties by default only in some classes, and config.json leaves defaults out.
    is_tied_by_default: bool = False

    @property
    def hf_class(self) -> str:
        return self.hf_classes[0]

    def require(self, model: ModelShape) -> None:
        """Raise ConversionError with the first requirement that `model` does not meet."""
        # The first only: later requirements often fail for the same reason.
        for requirement in self.requirements:
            if not requirement.is_met(model):
                value = requirement.value
                raise no_family(value if isinstance(value, str) else value(model), requirement.reason)


def expand(family: Family, model: ModelShape) -> list[TensorPair]:
    """Every tensor of the model, layer by layer."""
    return expand_rows(family.list_tensors(model), model)


def no_family(value: str, reason: str) -> ConversionError:
    """The error for a model that no class of transformers computes."""
    return ConversionError(
        f"architecture: a class of transformers must compute it, got {value}: {reason}. "
        "Keep the checkpoint in Megatron's format."
    )
