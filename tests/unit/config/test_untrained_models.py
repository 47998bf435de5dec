"""What a study can describe and training cannot: each field is refused by name, and none is dropped on the way."""

from dataclasses import replace

import pytest

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.config.untrained_models import UNTRAINED
from megatron_hammer.errors import ConfigError
from megatron_hammer.model.shape import LatentAttention, RopeScaling, SlidingWindow
from tests.helpers.toy_model import LLAMA, MOE

LATENT = LatentAttention(q_lora_rank=None, kv_lora_rank=6, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=5)
STUDIED = {
    "latent_attention": replace(LLAMA, latent_attention=LATENT),
    "has_attention_sinks": replace(LLAMA, has_attention_sinks=True),
    "has_qk_l2_norm": replace(LLAMA, has_qk_l2_norm=True),
    "has_query_temperature": replace(LLAMA, has_query_temperature=True),
    "num_mtp_layers": replace(LLAMA, num_mtp_layers=1),
    "activation": replace(LLAMA, activation="clamped_swiglu"),
    "sliding_window.is_chunked": replace(
        LLAMA, sliding_window=SlidingWindow(num_tokens=6, layers=(1,), is_chunked=True)
    ),
    "moe.has_scaled_inputs": replace(MOE, moe=replace(MOE.moe, has_scaled_inputs=True)),
    "rope_scaling": replace(LLAMA, rope_scaling=RopeScaling(factor=16.0, high_freq_factor=1.0)),
}


def test_each_field_has_a_model_here():
    assert STUDIED.keys() == UNTRAINED.keys()


@pytest.mark.parametrize("field", STUDIED)
def test_a_model_that_can_only_be_studied_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"^{field}: .* not trained here, got model={STUDIED[field].name}"):
        build_model_arguments(STUDIED[field])


def test_all_problems_are_named_at_once():
    model = replace(STUDIED["latent_attention"], num_mtp_layers=2)
    with pytest.raises(ConfigError) as caught:
        build_model_arguments(model)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["latent_attention", "num_mtp_layers"]
