"""The process groups that check_cluster.py builds are those of megatron.core.parallel_state."""

import pytest

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.training.cluster.rank_groups import list_groups

LAYOUTS = {
    "dense": ParallelLayout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        context_parallel_size=2,
        data_parallel_size=4,
    ),
    "experts": ParallelLayout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        data_parallel_size=6,
        expert_model_parallel_size=3,
        expert_tensor_parallel_size=1,
    ),
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_groups_are_those_of_megatron(name: str) -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = LAYOUTS[name]
    dense = RankGenerator(
        tp=layout.tensor_model_parallel_size,
        ep=1,
        dp=layout.data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=layout.context_parallel_size,
        order="tp-cp-ep-dp-pp",
    )
    expert = RankGenerator(
        tp=layout.expert_tp,
        ep=layout.expert_model_parallel_size,
        dp=layout.expert_data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=1,
        order="tp-cp-ep-dp-pp",
    )
    theirs = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp-cp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": expert.get_ranks("ep"),
    }
    ours = list_groups(layout)
    expected = {kind: sorted(map(tuple, groups)) for kind, groups in theirs.items() if len(groups[0]) > 1}
    assert {kind: sorted(groups) for kind, groups in ours.items()} == expected
