"""Every impossible value of a study has its own message."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.hardware.catalogue import select_gpu
from megatron_hammer.scaling.plan import ExpertOptions
from megatron_hammer.scaling.search.projection import DEFAULT_EXPERTS
from megatron_hammer.scaling.search.search_space import SearchSpace
from megatron_hammer.scaling.search.study_problems import find_study_problems
from tests.helpers.toy_study import CLUSTER, build_toy_study

MOE = select_preset("tiny-llm-zh-moe").model
MIXED = replace(MOE, moe=replace(MOE.moe, dense_layers=(0, 1)))


def test_formats_are_those_of_the_gpu() -> None:
    """The table of GPUs says which there are: scales of blocks and fp4 since Blackwell, fp8 since Hopper."""
    for gpu, precision, is_good in (
        ("h100-sxm", "fp8", True),
        ("h100-sxm", "mxfp8", False),
        ("h200-sxm", "nvfp4", False),
        ("a100-sxm-80gb", "fp8", False),
        ("v100-sxm3-32gb", "bf16", False),
        ("b200-sxm", "mxfp8", True),
        ("gb200", "nvfp4", True),
    ):
        problems = find_study_problems(
            build_toy_study(gpu=select_gpu(gpu), precision=precision, memory_limit_bytes=GIB)
        )
        assert (problems == []) == is_good, problems
        assert is_good or problems[0].startswith(
            f"precision: must be a format that the GPU has, got precision={precision}"
        )


def test_a_good_study_has_no_problems() -> None:
    assert find_study_problems(build_toy_study()) == []
    weak = build_toy_study(global_batch_size=None, samples_per_gpu=Fraction(1, 4))
    assert find_study_problems(weak) == []
    assert find_study_problems(build_toy_study(model=MIXED)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"gpu_counts": (8, 0, -1)},
            "gpus: must be whole numbers of at least 1, got 0, -1. Pass some, as in --gpus 8,64.",
        ),
        ({"gpu_counts": ()}, "gpus: must be whole numbers of at least 1, got none. Pass some, as in --gpus 8,64."),
        ({"gpu_counts": (8, 4, 8)}, "gpus: must name each size once, got 8 more than once. Drop the repetition."),
        (
            {"space": SearchSpace(tensor_model_parallel_sizes=(0, 2))},
            "tensor-model-parallel-size: must be whole numbers of at least 1, got 0. "
            "Pass some, as in --tensor-model-parallel-size 8,64.",
        ),
        (
            {"model": replace(MOE, num_layers=10**9)},
            "model: must have at most 2,000 layers, got num_layers=1,000,000,000 in tiny-llm-zh-moe. "
            "Correct its configuration.",
        ),
        (
            {"space": SearchSpace(expert_tensor_parallel_sizes=(7,))},
            "expert-tensor-parallel-size: must be left out for a model without experts, got 7 for hammer-1b4. Drop it.",
        ),
        ({"gpu_counts": (10**9 + 1,)}, "gpus: must be at most 1,000,000,000, got 1,000,000,001. Correct it."),
        (
            {"global_batch_size": 10**18},
            "global-batch-size: must be at most 1,000,000,000 samples, got 1,000,000,000,000,000,000. Correct it.",
        ),
        (
            {"space": SearchSpace(num_offloaded_layers=3, recomputes=("none",))},
            "cpu-offloading-num-layers: must have no pipeline beside it, got num_layers=3. "
            "Pass --pipeline-model-parallel-size 1 with it.",
        ),
        (
            {"space": SearchSpace(offload_modules=("attn_proj",))},
            "offload-modules: must have core_attn beside attn_proj, whose input is its output, got attn_proj. "
            "Add core_attn.",
        ),
        (
            {"space": SearchSpace(offload_modules=("core_attn", "moe_act"))},
            "offload-modules: must be of a model with experts for moe_act, got hammer-1b4. Drop them.",
        ),
        (
            {"model": MOE, "space": SearchSpace(offload_modules=("fused_group_mlp",))},
            "offload-modules: must be without fused_group_mlp, whose kernel no training here has, got fused_group_mlp. "
            "Pass expert_fc1,moe_act.",
        ),
        (
            {"space": SearchSpace(offload_modules=("mlp_norm",), recomputes=("full",))},
            "recompute: must keep what --offload-modules mlp_norm moves to the host, got full. Add none to it.",
        ),
        (
            {"space": SearchSpace(overlaps_experts=False)},
            "moe-comm-overlap: must be left out for a model without experts, got it for hammer-1b4. Drop it.",
        ),
        (
            {"space": SearchSpace(optimizer_offload_ratio=1.5, shardings=("distributed_optimizer",))},
            "optimizer-offload-fraction: must be from 0 to 1, got 1.5. Pass 1 to move all of the optimizer.",
        ),
        (
            {"space": SearchSpace(optimizer_offload_ratio=0.5)},
            "optimizer-offload-fraction: must have the distributed optimizer beside it, got 0.5. "
            "Pass --sharding distributed_optimizer with it.",
        ),
        ({"num_best": 0}, "top: must be at least 1, got 0. Pass --top 5."),
        (
            {"memory_limit_bytes": -(2**30)},
            "memory-gib: must be above 0 and at most the 40 of toy-gpu, got -1. Pass --memory-gib 76.",
        ),
        (
            {"memory_limit_bytes": 41 * 2**30},
            "memory-gib: must be above 0 and at most the 40 of toy-gpu, got 41. Pass --memory-gib 76.",
        ),
        ({"knee_ratio": 1.5}, "knee: must be above 0 and at most 1, got 1.5. Pass --knee 0.8."),
        ({"knee_ratio": float("nan")}, "knee: must be above 0 and at most 1, got nan. Pass --knee 0.8."),
        (
            {"train_tokens": 10**30},
            "train-tokens: must be at least 1 and at most 1e+18, got 1e+30. Pass --train-tokens 15T.",
        ),
        ({"train_tokens": 0}, "train-tokens: must be at least 1 and at most 1e+18, got 0. Pass --train-tokens 15T."),
        (
            {"usd_per_gpu_hour": -2.0},
            "usd-per-gpu-hour: must be at least 0 and at most 1e+06, got -2. Pass --usd-per-gpu-hour 2.5.",
        ),
        (
            {"usd_per_gpu_hour": float("inf")},
            "usd-per-gpu-hour: must be at least 0 and at most 1e+06, got inf. Pass --usd-per-gpu-hour 2.5.",
        ),
        (
            {"global_batch_size": 0},
            "global-batch-size: must be at least 1, got 0. Pass the samples of a step, as in --global-batch-size 512.",
        ),
        (
            {"global_batch_size": None, "samples_per_gpu": Fraction(1, 8)},
            "samples-per-gpu: must give whole samples per step at every size, got samples_per_gpu=0.125 with gpus=4. "
            "Pass a whole number, or sizes that are multiples of 8.",
        ),
        (
            {"precision": "fp8"},
            "precision: must be a format that the GPU has, got precision=fp8, gpu=toy-gpu. "
            "Use one of: fp32, fp16, bf16.",
        ),
        (
            {"precision": "fp16", "cluster": replace(CLUSTER, name="cpus", full_speed_processes_per_node=2)},
            "precision: must be fp32 or bf16 on a CPU host, got precision=fp16, cluster=cpus. Pass --precision bf16.",
        ),
        (
            {"model": MOE, "experts": ExpertOptions(imbalance_ratio=0.5)},
            "moe-imbalance: must be at least 1, got 0.5. Pass 1 for tokens that are spread evenly.",
        ),
        (
            {"experts": replace(DEFAULT_EXPERTS, dispatcher="deepep")},
            "moe-dispatcher: must be left out for a model without experts, got it for hammer-1b4. Drop it.",
        ),
        (
            {"space": SearchSpace(dispatchers=("alltoall",))},
            "moe-dispatcher: must be left out for a model without experts, got it for hammer-1b4. Drop it.",
        ),
        (
            {
                "model": MOE,
                "space": SearchSpace(dispatchers=("alltoall", "deepep")),
                "cluster": replace(CLUSTER, name="cpus", full_speed_processes_per_node=2),
            },
            "moe-dispatcher: must be alltoall or allgather on CPU processes, got deepep, cluster=cpus. Drop it.",
        ),
        ({"seq_length": 0}, "seq-length: must be at least 1, got 0. Pass tokens, as in --seq-length 4096."),
        (
            {"model": select_preset("gpt2-124m").model, "seq_length": 2048},
            "seq-length: must be at most the learned positions of gpt2-124m, got seq_length=2048, "
            "max_position_embeddings=1024. Pass --seq-length 1024.",
        ),
    ],
)
def test_one_problem(changes: dict[str, Any], problem: str) -> None:
    assert find_study_problems(build_toy_study(**changes)) == [problem]


def test_all_problems_at_once() -> None:
    study = build_toy_study(gpu_counts=(), num_best=0, precision="nvfp4", seq_length=-5)
    assert [problem.split(":")[0] for problem in find_study_problems(study)] == [
        "gpus",
        "top",
        "precision",
        "seq-length",
    ]
