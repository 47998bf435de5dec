"""Layer splits: equal to the installed Megatron's wherever that is exact, refused wherever it is not."""

import functools
import itertools
import warnings

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.pipeline_split import find_split_problems, select_stage, split_layers
from tests.helpers.messages import assert_problem


@functools.cache
def megatron_modules():
    import torch
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    return torch, TransformerConfig, get_num_layers_to_build, get_transformer_layer_offset


def split_by_megatron(num_layers: int, layout: ParallelLayout):
    """[pp_rank][vp_stage] -> (offset, layers) by megatron-core; its own exceptions come through."""
    torch, config_type, count_layers, find_offset = megatron_modules()
    vp = layout.virtual_pipeline_model_parallel_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_type(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=2,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
            pipeline_dtype=torch.float32,
            num_layers_in_first_pipeline_stage=layout.num_layers_first_stage,
            num_layers_in_last_pipeline_stage=layout.num_layers_last_stage,
            account_for_embedding_in_pipeline_split=layout.accounts_for_embedding,
            account_for_loss_in_pipeline_split=layout.accounts_for_loss,
        )
    chunks = range(vp) if vp > 1 else [None]
    return tuple(
        tuple(
            (find_offset(config, vp_stage=chunk, pp_rank=rank), count_layers(config, vp_stage=chunk, pp_rank=rank))
            for chunk in chunks
        )
        for rank in range(layout.pipeline_model_parallel_size)
    )


def is_exact(split, num_layers: int) -> bool:
    layers = [layer for stage in split for first, size in stage for layer in range(first, first + size)]
    return sorted(layers) == list(range(num_layers))


def layouts_of(pp: int, vp: int):
    sizes = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vp}
    for embedding, loss in itertools.product((False, True), repeat=2):
        yield ParallelLayout(**sizes, accounts_for_embedding=embedding, accounts_for_loss=loss)
    for first, last in itertools.product((None, 1, 2, 3, 4), repeat=2):
        if (first, last) != (None, None):
            yield ParallelLayout(**sizes, num_layers_first_stage=first, num_layers_last_stage=last)


@pytest.mark.parametrize("pp, vp", itertools.product((1, 2, 3, 4), (1, 2, 3)))
def test_every_small_split_is_megatrons_or_refused(pp, vp):
    num_compared = 0
    for num_layers, layout in itertools.product((1, 2, 3, 5, 6, 7, 8, 11, 12, 16, 22), layouts_of(pp, vp)):
        try:
            theirs = split_by_megatron(num_layers, layout)
        except (ValueError, AssertionError, ZeroDivisionError):
            theirs = None
        if find_split_problems(num_layers, layout):
            # On one stage Megatron takes a first (or last) stage that holds every layer; here the flag is refused.
            is_no_op = pp == 1 and num_layers in (layout.num_layers_first_stage, layout.num_layers_last_stage)
            assert is_no_op or theirs is None or not is_exact(theirs, num_layers), (num_layers, layout, theirs)
            with pytest.raises(ConfigError):
                split_layers(num_layers, layout)
        else:
            assert split_layers(num_layers, layout) == theirs, (num_layers, layout)
            num_compared += 1
    assert num_compared > 0 or (pp == 1 and vp > 1)


@pytest.mark.parametrize(
    "num_layers, pp, vp", [(80, 4, 5), (80, 16, 5), (96, 8, 12), (126, 9, 7), (40, 8, 1), (22, 11, 2), (80, 4, 20)]
)
def test_large_splits_are_megatrons(num_layers, pp, vp):
    layout = ParallelLayout(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vp)
    ours = split_layers(num_layers, layout)
    assert ours == split_by_megatron(num_layers, layout)
    assert is_exact(ours, num_layers)


def test_llama3_405b_with_embedding_and_loss_as_layers():
    # 126 layers + embedding + loss = 128 over 16 stages of 8 chunks: the published split of the 405B model.
    layout = ParallelLayout(
        pipeline_model_parallel_size=16,
        virtual_pipeline_model_parallel_size=8,
        accounts_for_embedding=True,
        accounts_for_loss=True,
    )
    ours = split_layers(126, layout)
    assert ours == split_by_megatron(126, layout)
    assert ours[0][0] == (0, 0)
    assert ours[-1][-1] == (126, 0)


def test_interleaved_chunks_alternate_between_stages():
    layout = ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert split_layers(8, layout) == (((0, 2), (4, 2)), ((2, 2), (6, 2)))


REFUSED = {
    "not divisible": (
        22,
        {"pipeline_model_parallel_size": 4},
        r"pipeline-model-parallel-size: must divide num_layers, got pp=4, num_layers=22\. Use 1, 2, 11 or 22, or pass "
        r"--decoder-first-pipeline-num-layers\.",
    ),
    "trained 64 of 80": (
        80,
        {"pipeline_model_parallel_size": 16, "virtual_pipeline_model_parallel_size": 2},
        r"must divide the 5 layers of a stage, got vp=2, pp=16, num_layers=80 \(rounding down would build 64 of 80\)\. "
        r"Use 1 or 5\.",
    ),
    "chunks on one stage": (
        12,
        {"virtual_pipeline_model_parallel_size": 3},
        r"needs more than one pipeline stage, got vp=3, pp=1",
    ),
    "embedding as a layer": (
        22,
        {"pipeline_model_parallel_size": 4, "accounts_for_embedding": True},
        r"got pp=4, num_layers=22 \+ 1 for embedding and loss\. Use 1 or 23",
    ),
    "two ways at once": (
        22,
        {"pipeline_model_parallel_size": 4, "num_layers_first_stage": 4, "accounts_for_loss": True},
        r"cannot be combined with --account-for-embedding-in-pipeline-split",
    ),
    "uneven on one stage": (
        22,
        {"num_layers_last_stage": 3},
        r"decoder-last-pipeline-num-layers: needs more than one pipeline stage, got pp=1",
    ),
    "uneven middle": (
        22,
        {"pipeline_model_parallel_size": 4, "num_layers_first_stage": 5},
        r"must divide over 3 stages, got num_layers=22, first=5, leaving 17 for 3 stages\. Change "
        r"--decoder-first-pipeline-num-layers",
    ),
    "uneven first chunk": (
        22,
        {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2, "num_layers_first_stage": 5},
        r"decoder-first-pipeline-num-layers: must be a multiple of the 2 virtual chunks, got 5\. Use 6\.",
    ),
    "nothing left": (
        6,
        {"pipeline_model_parallel_size": 3, "num_layers_first_stage": 3, "num_layers_last_stage": 3},
        r"every stage one layer, got num_layers=6, first=3, last=3, leaving 0 for 1 stages",
    ),
    "no middle to take the rest": (
        22,
        {"pipeline_model_parallel_size": 2, "num_layers_first_stage": 10, "num_layers_last_stage": 11},
        r"leaving 1 for 0 stages",
    ),
    "two interleaved stages, both sizes": (
        6,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "num_layers_first_stage": 2,
            "num_layers_last_stage": 4,
        },
        r"decoder-last-pipeline-num-layers: cannot be given beside the first on two interleaved stages, got vp=2\.",
    ),
    "empty first stage": (
        22,
        {"pipeline_model_parallel_size": 2, "num_layers_first_stage": 0},
        r"decoder-first-pipeline-num-layers: must be at least 1, got 0",
    ),
    "size below one": (
        22,
        {"pipeline_model_parallel_size": 0},
        r"pipeline-model-parallel-size: must be at least 1, got pipeline-model-parallel-size=0",
    ),
}


@pytest.mark.parametrize("num_layers, sizes, message", REFUSED.values(), ids=REFUSED)
def test_refused_with_a_remedy(num_layers, sizes, message):
    with pytest.raises(ConfigError, match=message):
        split_layers(num_layers, ParallelLayout(**sizes))


def test_all_problems_at_once():
    layout = ParallelLayout(virtual_pipeline_model_parallel_size=3, num_layers_first_stage=4)
    with pytest.raises(ConfigError) as caught:
        split_layers(22, layout)
    assert len(caught.value.problems) == 2


def test_stage_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"pp_rank: must be a pipeline stage, got pp_rank=2, pp=2\. Use 0 to 1\."):
        select_stage(22, ParallelLayout(pipeline_model_parallel_size=2), 2)


def test_chunks_of_any_size() -> None:
    """DeepSeek-V3 on 4 stages of 2 chunks, where a micro-batch passes the first chunk of every stage first."""
    sizes = (7, 8, 8, 8, 8, 8, 8, 6)
    layout = ParallelLayout(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2, chunk_layers=sizes)
    stages = split_layers(61, layout)
    assert [[chunk.num_layers for chunk in stage] for stage in stages] == [[7, 8], [8, 8], [8, 8], [8, 6]]
    assert stages[0][1].first_layer == 31
    (problem,) = find_split_problems(60, layout)
    assert_problem(problem, "pipeline-model-parallel-layout", "60 layers", "61 layers")
