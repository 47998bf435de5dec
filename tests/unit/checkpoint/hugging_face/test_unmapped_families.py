"""The refusal of a family says what it computes otherwise; no family is both mapped and refused."""

import re

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config
from megatron_hammer.checkpoint.hugging_face.families.catalogue import FAMILIES
from megatron_hammer.checkpoint.hugging_face.unmapped_families import list_unmapped
from megatron_hammer.errors import ConversionError

# Their classes live in repositories of their own, or came and went under this name.
OWN_CODE = {
    *("baichuan", "chatglm", "exaone", "internlm", "internlm2", "kimi_k2"),
    *("minicpm", "orion", "qwen", "xverse"),
}


def test_a_family_is_mapped_or_refused_and_its_name_is_one_of_transformers():
    assert set(list_unmapped()) & FAMILIES.keys() == set()
    assert len(set(list_unmapped())) == len(list_unmapped())
    assert set(list_unmapped()) - CONFIG_MAPPING_NAMES.keys() <= OWN_CODE


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({"model_type": "gemma2"}, "1 + weight"),
        ({"model_type": "deepseek_v3"}, "multi-latent"),
        ({"model_type": "cohere"}, "side by side"),
        ({"model_type": "jamba"}, "keep a state"),
        ({"model_type": "new_vl", "vision_config": {"depth": 3}}, "more than a model of text"),
        ({"model_type": "new", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "new", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "code of its own repository"),
        ({"model_type": "new"}, "nothing is known"),
        ({"model_type": ["llama"]}, "nothing is known"),
        ({}, "nothing is known"),
    ],
)
def test_the_refusal_says_what_differs(config, phrase):
    with pytest.raises(
        ConversionError, match=f"^config.json, model_type: must be one of .*got .*{re.escape(phrase)}.*Use a"
    ):
        interpret_config(config)
