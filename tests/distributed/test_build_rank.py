"""One rank of a cluster, built alone, agrees with preflight's arithmetic at every preset's published layout."""

import dataclasses
import json

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.tool_runs import run_tool

NUM_COPIES = 16  # of the model: a small cluster; the one rank of 4,096 below is a large one
LAYOUTS = {
    "uneven stages": ("hammer-1b4", 22, "--pipeline-model-parallel-size 11 --decoder-first-pipeline-num-layers 1 "
                      "--decoder-last-pipeline-num-layers 3"),
    "embedding and loss as layers": ("hammer-1b4", 12, "--pipeline-model-parallel-size 6 "
                                     "--account-for-embedding-in-pipeline-split "
                                     "--account-for-loss-in-pipeline-split --num-virtual-stages-per-pipeline-rank 2"),
    "tied head on another stage": ("open-llama-7b", 8, "--tensor-model-parallel-size 2 "
                                   "--pipeline-model-parallel-size 4"),
    "more tensor ranks than query groups": ("hammer-1b4", 16, "--tensor-model-parallel-size 8"),
    "experts inside context ranks": ("tiny-llm-zh-moe", 16, "--tensor-model-parallel-size 2 "
                                     "--context-parallel-size 2 --expert-model-parallel-size 4"),
    "experts not cut by tensor": ("hammer-tiny-moe", 8, "--tensor-model-parallel-size 2 "
                                  "--expert-tensor-parallel-size 1 --expert-model-parallel-size 4"),
    "wide heads": ("hammer-tiny", 2, "--kv-channels 24 --tensor-model-parallel-size 2"),
    "whole optimizer": ("hammer-tiny", 4, "--no-distributed-optimizer"),
}  # fmt: skip


def build(preset: str, world_size: int, rank: int, *flags: str):
    from megatron_hammer.training.build_rank import build_rank

    return build_rank(["--preset", preset, "--world-size", str(world_size), *flags], rank)


def pick_ranks(world_size: int) -> list[int]:
    return [0, world_size // 2, world_size - 1]


@pytest.mark.parametrize("name", PRESETS)
def test_published_layout(name: str) -> None:
    recipe = PRESETS[name].recipe
    world_size = NUM_COPIES * recipe.tensor_model_parallel_size * recipe.pipeline_model_parallel_size
    layers: set[int] = set()
    for rank in pick_ranks(world_size):
        built = build(name, world_size, rank)
        assert built.has_embedding == (built.pp_rank == 0)
        assert built.has_head == (built.pp_rank == built.pp - 1)
        layers |= {layer for chunk in built.layers for layer in chunk}
    if recipe.pipeline_model_parallel_size == 1:
        assert layers == set(range(PRESETS[name].model.num_layers))


@pytest.mark.parametrize("name", LAYOUTS)
def test_unusual_layout(name: str) -> None:
    preset, world_size, flags = LAYOUTS[name]
    for rank in pick_ranks(world_size):
        build(preset, world_size, rank, *flags.split())


def test_every_rank_together_is_the_model() -> None:
    """Parameters of one tensor-parallel slice through all stages, and shards of all data ranks, are exact sums."""
    flags = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
    ranks = [build("hammer-tiny", 8, rank, *flags) for rank in range(8)]
    stages = {built.pp_rank: built for built in ranks}
    assert sum(built.num_parameters for built in stages.values()) == PRESETS["hammer-tiny"].num_parameters
    for pp_rank, stage in stages.items():
        shards = [built.optimizer_parameters for built in ranks if built.pp_rank == pp_rank]
        assert len(shards) == 4
        assert sum(shards) == stage.num_parameters
    assert sorted(layer for built in stages.values() for chunk in built.layers for layer in chunk) == [0, 1, 2, 3]


def test_twin_a_wrong_count_is_noticed() -> None:
    from megatron_hammer.training.build_rank import DisagreementError, compare, read_rank_plan

    argv = ["--preset", "hammer-tiny", "--world-size", "4"]
    built = build("hammer-tiny", 4, 3)
    _, plan = read_rank_plan(argv)
    compare(plan, built)
    for field, wrong in (
        ("dense_parameters", built.dense_parameters - 1),
        ("layers", ((0, 1, 2),)),
        ("tp_rank", 1),
        ("optimizer_parameters", 2 * built.optimizer_share),
    ):
        with pytest.raises(DisagreementError, match=f"{field}: counted"):
            compare(plan, dataclasses.replace(built, **{field: wrong}))


def test_refused_layouts() -> None:
    with pytest.raises(ConfigError, match=r"rank: must lie in the layout's world, got rank=4, world_size=4\b"):
        build("hammer-tiny", 4, 4)
    with pytest.raises(ConfigError, match=r"would build 64 of 80\b"):
        build(
            "llama2-70b", 4096, 0, "--pipeline-model-parallel-size", "16", "--num-virtual-stages-per-pipeline-rank", "2"
        )


def test_one_rank_of_4096_as_a_command() -> None:
    flags = "--preset llama2-70b --world-size 4096 --rank 3071 --json"
    layout = "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4"
    result = run_tool("tools/build_rank.py", *flags.split(), *layout.split())
    assert result.returncode == 0, result.stderr
    built = json.loads(result.stdout)
    assert (built["tp_rank"], built["dp_rank"], built["pp_rank"]) == (7, 127, 2)
    assert built["layers"] == [list(range(40, 60))]
    assert built["num_parameters"] == 2_139_422_720
