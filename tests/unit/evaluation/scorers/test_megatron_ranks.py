"""Which numbers of processes fit a layout."""

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout, validate_layout


@pytest.mark.parametrize(("tp", "pp", "world_size", "fits"), [(1, 1, 3, True), (2, 2, 8, True), (1, 3, 2, False)])
def test_the_processes_must_be_a_multiple_of_the_layout(
    monkeypatch: pytest.MonkeyPatch, tp: int, pp: int, world_size: int, fits: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    layout = ModelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    if fits:
        validate_layout(layout)
    else:
        with pytest.raises(ConfigError, match=r"must divide the number of processes, got 1 x 3 with 2.*per-node 3"):
            validate_layout(layout)


@pytest.mark.parametrize("size", [0, -1])
def test_a_layout_has_at_least_one_rank(size: int) -> None:
    with pytest.raises(ConfigError, match=f"pipeline-model-parallel-size: must be at least 1, got {size}"):
        validate_layout(ModelLayout(pipeline_model_parallel_size=size))
