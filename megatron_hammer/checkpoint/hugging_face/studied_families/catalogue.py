"""Reads the model of a scaling study: families that can be converted, and those whose models can be studied only.

A studied family has the rows of its config.json and no tensors. Its shape has what costs time or memory, and has fields
that training refuses (config/untrained_models.py). In which format a folder stores its weights says nothing of a
training, so quantization_config is read over here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config, read_named_config
from megatron_hammer.checkpoint.hugging_face.families.catalogue import FAMILIES
from megatron_hammer.checkpoint.hugging_face.family import ConfigFamily
from megatron_hammer.checkpoint.hugging_face.studied_families.deepseek_v3 import DEEPSEEK_V3
from megatron_hammer.checkpoint.hugging_face.studied_families.gpt_oss import GPT_OSS
from megatron_hammer.checkpoint.hugging_face.studied_families.llama4 import LLAMA4_TEXT, select_text_config
from megatron_hammer.model.shape import ModelShape

STUDIED: dict[str, ConfigFamily] = {family.model_type: family for family in (DEEPSEEK_V3, GPT_OSS, LLAMA4_TEXT)}


def read_studied_model(path: Path) -> ModelShape:
    """The model of a Hugging Face folder, or of a config.json under any name, for a study.

    Raises ConversionError naming every field that a study cannot take.
    """
    config, name = read_named_config(path)
    return interpret_studied_config(config, name=name, source=str(path))


def interpret_studied_config(config: Mapping[str, Any], *, name: str = "model", source: str = "") -> ModelShape:
    """What a config.json that was read describes, as interpret_config; of Llama 4, its text model."""
    text_config = select_text_config(config)
    if text_config is not None:
        config, name = text_config, f"{name}-text"
    shape, _ = interpret_config(config, name=name, source=source, families={**FAMILIES, **STUDIED})
    return shape
