"""The grid of ranks is Megatron's own, and an impossible grid is refused."""

import itertools

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.layout import ParallelLayout, count_shards, find_grid_problems
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.recipe_layouts import build_layout


@pytest.mark.parametrize("tp, cp, dp, pp", [(2, 1, 3, 4), (3, 2, 2, 1), (1, 1, 5, 2), (2, 3, 1, 5)])
def test_dense_coordinates_are_those_of_rank_generator(tp, cp, dp, pp):
    from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
    )
    grid = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    for token in ("tp", "cp", "dp", "pp"):
        for group in grid.get_ranks(token):
            places = [layout.coordinates(rank) for rank in group]
            assert [getattr(place, f"{token}_rank") for place in places] == list(range(len(group)))


@pytest.mark.parametrize("tp, etp, ep, dp, pp", [(2, 2, 2, 4, 3), (2, 1, 4, 6, 1), (1, 1, 5, 5, 2), (4, 2, 2, 1, 2)])
def test_expert_coordinates_are_those_of_rank_generator(tp, etp, ep, dp, pp):
    from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        expert_tensor_parallel_size=etp,
        expert_model_parallel_size=ep,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
    )
    grid = RankGenerator(tp=etp, ep=ep, dp=layout.expert_data_parallel_size, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    for token, name in {"tp": "expert_tp_rank", "ep": "ep_rank", "dp": "expert_dp_rank", "pp": "pp_rank"}.items():
        for group in grid.get_ranks(token):
            assert [getattr(layout.coordinates(rank), name) for rank in group] == list(range(len(group)))


def test_every_rank_has_its_own_place():
    layout = ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=6, pipeline_model_parallel_size=3)
    places = {layout.coordinates(rank) for rank in range(layout.world_size)}
    assert len(places) == layout.world_size == 36


@pytest.mark.parametrize("rank", [-1, 36])
def test_rank_outside_the_world_is_refused(rank):
    layout = ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=6, pipeline_model_parallel_size=3)
    with pytest.raises(ConfigError, match=rf"rank: .* got rank={rank}, world_size=36\. Use 0 to 35\."):
        layout.coordinates(rank)


def test_all_sizes_below_one_are_reported_together():
    problems = find_grid_problems(ParallelLayout(tensor_model_parallel_size=0, data_parallel_size=-1))
    assert [problem.split(":")[0] for problem in problems][:2] == ["tensor-model-parallel-size", "data-parallel-size"]


def test_experts_that_do_not_tile_the_ranks_are_refused():
    layout = ParallelLayout(data_parallel_size=6, expert_model_parallel_size=4)
    with pytest.raises(ConfigError, match=r"must divide the 6 ranks .* got ep=4, etp=1\. Use .* from 1, 2, 3 or 6\b"):
        layout.coordinates(0)


def test_layout_of_a_recipe():
    layout = build_layout(PRESETS["llama3-70b"].recipe, data_parallel_size=16)
    assert (layout.world_size, layout.virtual_pipeline_model_parallel_size) == (512, 5)
    assert layout.has_sequence_parallel
    assert layout.coordinates(511)[:4] == (7, 0, 15, 3)


def test_expert_ranks_lie_inside_data_and_context_ranks():
    layout = ParallelLayout(context_parallel_size=2, data_parallel_size=3, expert_model_parallel_size=6)
    assert layout.expert_data_parallel_size == 1
    assert layout.dense_shard_size == 6
    ep_ranks = [layout.coordinates(rank).ep_rank for rank in range(layout.world_size)]
    assert ep_ranks == list(range(6))


def test_expert_tensor_size_defaults_to_the_dense_one():
    for tp, etp in itertools.product((1, 2, 4), (None, 1, 2)):
        layout = ParallelLayout(tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp)
        assert layout.expert_tp == (etp or tp)


def test_experts_are_split_into_as_many_copies_as_the_dense_state() -> None:
    """As megatron.core does with --num-distributed-optimizer-instances: 64 / 32 = 2 copies, whatever is sharded."""
    layout = ParallelLayout(
        tensor_model_parallel_size=8,
        data_parallel_size=64,
        expert_model_parallel_size=64,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=3,
    )
    assert count_shards(layout, None) == (64, 8)
    assert count_shards(layout, 32) == (32, 4)
    assert count_shards(layout, 8) == (8, 1)
    assert count_shards(layout, 128) == (64, 8)
