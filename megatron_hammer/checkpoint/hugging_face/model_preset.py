"""The model of a Hugging Face folder as a preset, so that flags, counts and checks serve it as a shipped one."""

import dataclasses

from megatron_hammer.checkpoint.hugging_face.saved_model import Architecture
from megatron_hammer.model.shape import ModelShape


def build_model_preset(architecture: Architecture, *, name: str, source: str) -> ModelShape:
    """The preset that trains `architecture`.

    Dropout is not part of it: it belongs to a recipe. `config.preset_arguments.model_arguments` gives Megatron's flags.
    """
    shared = {field.name for field in dataclasses.fields(ModelShape)} & set(Architecture.__slots__)
    values = {field: getattr(architecture, field) for field in shared}
    return ModelShape(
        name=name,
        source=source,
        kv_channels=architecture.head_dim,
        **values,
    )
