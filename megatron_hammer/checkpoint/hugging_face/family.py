"""What a family is: one model_type of transformers, with its config.json, its tensors, and the models it computes.

A family is one file in families/ and one entry in families/catalogue.py; one whose models can only be studied lies in
studied_families/ instead.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair, TensorRow, expand_rows
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, MoeShape


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a model must be for the family's class to compute it. value: what the message shows where it is not."""

    is_met: Callable[[ModelShape], bool]
    value: str | Callable[[ModelShape], str]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFamily:
    """What config.json says in one model_type of transformers; of a scaling study no more is asked.

    hf_classes: its causal language model, then older spellings. config: the rows of config.json. constants: fields of
    ModelShape that are the same in every model. own_fields: fields of config.json that its rows read and every other
    family refuses.
    """

    model_type: str
    hf_classes: tuple[str, ...]
    config: tuple[ConfigRow, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    own_fields: frozenset[str] = frozenset()
    # Without it, a number of experts in config.json is refused: config_fields.require_no_experts.
    has_experts: bool = False
    has_own_code: bool = False  # the class lives in the folder; known here by its published source
    began_with_own_code: bool = False  # published folders name the code that the class of transformers was made of
    # transformers ties by default only in some classes, and config.json leaves defaults out.
    is_tied_by_default: bool = False

    @property
    def hf_class(self) -> str:
        return self.hf_classes[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family(ConfigFamily):
    """One model_type that can be converted.

    list_tensors: the rows of its weights. is_candidate: whether a model is of this kind; of several candidates, the
    first in the catalogue is taken. requirements: what a candidate must be. features: the names in FEATURES that its
    config.json can say.
    """

    list_tensors: Callable[[ModelShape], tuple[TensorRow, ...]]
    is_candidate: Callable[[ModelShape], bool]
    requirements: tuple[Requirement, ...] = ()
    features: frozenset[str] = frozenset()

    def computes(self, model: ModelShape) -> bool:
        """Whether the class computes `model`."""
        has_constants = all(getattr(model, name) == value for name, value in self.constants.items() if "." not in name)
        # What only a constant can be, and no row of config.json.
        has_qk_norm = "has_qk_norm" in self.features or (self.constants.get("has_qk_norm", False) == model.has_qk_norm)
        is_of_this_kind = self.is_candidate(model) and (model.moe is not None) == self.has_experts
        has_features = self.features.issuperset(list_features(model))
        return (
            is_of_this_kind
            and (has_constants and has_qk_norm and has_features)
            and all(requirement.is_met(model) for requirement in self.requirements)
        )

    def require(self, model: ModelShape) -> None:
        """Raise ConversionError with the first requirement that `model` does not meet."""
        if missing := sorted(set(list_features(model)) - self.features):
            values = ", ".join(f"{name}={_read(model, name)}" for name in missing)
            raise no_family(values, f"{self.hf_class}, which is the nearest, has no such field")
        # The first only: later requirements often fail for the same reason.
        for requirement in self.requirements:
            if not requirement.is_met(model):
                value = requirement.value
                raise no_family(value if isinstance(value, str) else value(model), requirement.reason)


# Fields of ModelShape that only some classes have a field for. Any value but the default must be in Family.features.
FEATURES = (
    *("rotary_percent", "layers_without_rope"),
    *("sliding_window", "embedding_multiplier", "attention_scale", "residual_multiplier", "logits_multiplier"),
    *("moe.dense_layers", "moe.score_function", "moe.has_expert_bias", "moe.topk_scaling_factor", "moe.num_groups"),
)
_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(ModelShape)}
_DEFAULTS |= {f"moe.{entry.name}": entry.default for entry in dataclasses.fields(MoeShape)}


def list_features(model: ModelShape) -> list[str]:
    """The fields in FEATURES that are not as in a plain model."""
    return [name for name in FEATURES if _read(model, name) != _DEFAULTS[name]]


def _read(model: ModelShape, name: str) -> Any:
    """The value of a field that may be one of the experts; its default in a dense model."""
    owner, _, entry = name.rpartition(".")
    if not owner:
        return getattr(model, entry)
    return _DEFAULTS[name] if model.moe is None else getattr(model.moe, entry)


def expand(family: Family, model: ModelShape) -> list[TensorPair]:
    """Every tensor of the model, layer by layer."""
    return expand_rows(family.list_tensors(model), model)


def no_family(value: str, reason: str) -> ConversionError:
    """The error for a model that no class of transformers computes."""
    return ConversionError(
        f"architecture: a class of transformers must compute it, got {value}: {reason}. "
        "Keep the checkpoint in Megatron's format."
    )
