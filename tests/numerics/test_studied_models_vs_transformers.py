"""Published mixtures of experts: the study counts exactly as many parameters as transformers builds, on meta."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config
from megatron_hammer.checkpoint.hugging_face.studied_families.catalogue import STUDIED, read_studied_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.accounting import count_active_parameters, count_parameters
from megatron_hammer.model.shape import ModelShape

CONFIGS = Path(__file__).parent / "published_configs"
# (all, of one token) in billions as the publishers state them, without layers for further tokens. GPT-OSS does not
# count the input embedding as a part that a token is computed with: arXiv 2508.10925, table 1.
PUBLISHED = {
    "deepseek_v3": (671, 37),
    "gpt_oss_20b": (20.91, 3.61),
    "gpt_oss_120b": (116.83, 5.13),
    "llama4_scout": (109, 17),
    "llama4_maverick": (400, 17),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235, 22),
    "mixtral_8x7b": (46.7, 12.9),
    "mixtral_8x22b": (141, 39),
}


def read_text_document(name: str) -> dict[str, Any]:
    document = json.loads((CONFIGS / f"{name}.json").read_text())
    return document.get("text_config", document)


def count_built(document: dict[str, Any], model: ModelShape) -> tuple[int, int]:
    """(all, of one token) of the model that transformers builds."""
    # Stored formats and code of the folder are no part of the model.
    plain = {name: value for name, value in document.items() if name not in ("quantization_config", "auto_map")}
    config = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    total = active = 0
    for name, parameter in built.named_parameters():
        total += parameter.numel()
        is_expert = ".experts." in name
        active += parameter.numel() * model.moe.router_topk // model.moe.num_experts if is_expert else parameter.numel()
    return total, active


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_mixture_has_exactly_its_parameters(name):
    model = replace(read_studied_model(CONFIGS / f"{name}.json"), num_mtp_layers=0)
    assert (count_parameters(model), count_active_parameters(model)) == count_built(read_text_document(name), model)
    total, active = PUBLISHED[name]
    assert count_parameters(model) / 1e9 == pytest.approx(total, rel=0.015)
    embedding = model.vocab_size * model.hidden_size
    assert (
        min(abs(count_active_parameters(model) - used - active * 1e9) for used in (0, embedding)) <= 0.02 * active * 1e9
    )


def test_twin_a_forgotten_shared_expert_is_noticed():
    document = read_text_document("llama4_scout")
    model = read_studied_model(CONFIGS / "llama4_scout.json")
    without = replace(model, moe=replace(model.moe, shared_expert_intermediate_size=0))
    assert count_parameters(without) != count_built(document, model)[0]


@pytest.mark.parametrize("model_type", STUDIED)
def test_what_can_be_studied_only_is_still_refused_by_conversion(model_type):
    with pytest.raises(ConversionError, match=f"model_type: must be one of .* got model_type='{model_type}'"):
        interpret_config({"model_type": model_type})
