"""Other sizes keep the proportions of their model."""

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import count_parameters, find_shard_problems
from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.decisions.scaled_shape import scale_shape
from megatron_hammer.scaling.loss_law.runs import count_size


@pytest.mark.parametrize("preset", ["llama3-8b", "llama3-70b", "hammer-1b4", "gpt2-124m"])
def test_its_own_size_gives_the_model_itself(preset: str) -> None:
    model = PRESETS[preset].model
    for factor in (1, 0.97, 1.04):
        assert scale_shape(model, factor * count_parameters(model), "total") == model
    assert scale_shape(model, 1.5 * count_parameters(model), "total") != model


@pytest.mark.parametrize("size", [1e9, 3.3e9, 2.2e10, 1.3e11, 9e11])
def test_another_size_is_close_and_has_the_proportions(size: float) -> None:
    base = PRESETS["llama3-8b"].model
    shape = scale_shape(base, size, "non-embedding")
    assert count_size(shape, "non-embedding") == pytest.approx(size, rel=0.05)
    assert shape.head_dim == base.head_dim
    assert shape.num_attention_heads == 4 * shape.num_query_groups
    assert shape.ffn_hidden_size == pytest.approx(3.5 * shape.hidden_size, rel=0.01)
    assert 0.5 < shape.hidden_size / shape.num_layers / 128 < 2
    assert shape.num_layers % 2 == 0
    assert not find_shard_problems(shape, ParallelLayout(tensor_model_parallel_size=2))


def test_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be dense with plain attention"):
        scale_shape(PRESETS["hammer-tiny-moe"].model, 1e9, "total")
    with pytest.raises(ConfigError, match="vocabulary of llama3-8b"):
        scale_shape(PRESETS["llama3-8b"].model, 2e7, "total")
    for size in (1.0, 1e16):
        with pytest.raises(ConfigError, match="num_parameters="):
            scale_shape(PRESETS["llama3-8b"].model, size, "total")
