"""Flags become a study; the recipe, the GPU and the cluster supply the defaults."""

import argparse
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import project
from megatron_hammer.cli.scaling_study.study_arguments import build_study
from megatron_hammer.errors import ConfigError
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.search.projection import Study
from megatron_hammer.scaling.search.search_space import SearchSpace
from tests.helpers.messages import raises_problem

MACHINE = ("--gpu", "h100-sxm", "--gpus", "8,64")
LLAMA = ("--preset", "llama3-8b", *MACHINE)


def read_hf_model(path: Path) -> ModelShape:
    return select_preset("tinyllama-1b1").model


def parse(*flags: str) -> Study:
    parser = argparse.ArgumentParser()
    project.add_arguments(parser)
    return build_study(parser.parse_args(flags), read_hf_model)


def test_the_command_of_the_design_page() -> None:
    study = parse("--preset", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "8,64,512,4096")
    assert (study.model.name, study.preset, study.hf_config) == ("llama3-8b", "llama3-8b", None)
    assert (study.gpu.name, study.cluster.name, study.gpu_counts) == ("h100-sxm", "dgx-h100", (8, 64, 512, 4096))
    recipe = select_preset("llama3-8b").recipe
    assert (study.seq_length, study.global_batch_size) == (recipe.seq_length, recipe.global_batch_size)
    assert (study.precision, study.train_tokens) == ("bf16", recipe.train_tokens)
    assert study.memory_limit_bytes == round(0.95 * study.gpu.memory_bytes)
    assert study.space == SearchSpace()
    assert (study.num_best, study.knee_ratio, study.mfu_convention, study.gradient_bytes) == (5, 0.8, "A", 4)


def test_typed_flags_replace_the_defaults() -> None:
    study = parse(
        *LLAMA,
        *("--cluster", "aws-p5", "--samples-per-gpu", "1/4", "--seq-length", "4096", "--precision", "fp8"),
        *("--train-tokens", "1.5T", "--memory-gib", "70", "--usd-per-gpu-hour", "2", "--top", "2", "--knee", "0.9"),
        *("--mfu-convention", "D", "--grad-reduce-in-bf16", "--tp-comm-overlap", "off", "--sharding", "fsdp,none"),
        *("--recompute", "full", "--tensor-model-parallel-size", "4,8", "--micro-batch-size", "1"),
    )
    assert (study.cluster.name, study.usd_per_gpu_hour) == ("aws-p5", 2.0)
    assert (study.global_batch_size, study.samples_per_gpu) == (None, Fraction(1, 4))
    assert (study.seq_length, study.precision, study.train_tokens) == (4096, "fp8", 1_500_000_000_000)
    assert (study.memory_limit_bytes, study.num_best, study.knee_ratio) == (70 * 2**30, 2, 0.9)
    assert (study.mfu_convention, study.gradient_bytes) == ("D", 2)
    assert study.space == SearchSpace(
        tensor_model_parallel_sizes=(4, 8),
        micro_batch_sizes=(1,),
        recomputes=("full",),
        shardings=("none", "fsdp"),
        overlaps_tensor_parallel=False,
    )


@pytest.mark.parametrize(
    ("text", "tokens"), [("15T", 15 * 10**12), ("2e9", 2 * 10**9), ("300b", 3 * 10**11), ("1_000", 1000)]
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse(*LLAMA, "--train-tokens", text).train_tokens == tokens


def test_a_cluster_with_a_price() -> None:
    assert parse(*LLAMA, "--cluster", "oci-h100").usd_per_gpu_hour == 10.0
    assert parse(*LLAMA).usd_per_gpu_hour is None


def test_dispatchers_are_those_that_are_installed() -> None:
    moe = ("--preset", "qwen3-30b-a3b", *MACHINE)
    assert parse(*moe).dispatchers == ("alltoall",)
    several = parse(*moe, "--moe-dispatcher", "deepep,alltoall")
    assert several.dispatchers == ("alltoall", "deepep")
    assert parse(*moe, "--moe-dispatcher", "hybridep").experts.dispatcher == "hybridep"
    with pytest.raises(ConfigError, match=r"moe-dispatcher: must be of allgather, alltoall, .* got ncclep"):
        parse(*moe, "--moe-dispatcher", "deepep,ncclep")


def test_a_cluster_of_another_gpu_is_said_to_be_one(capsys) -> None:
    assert parse(*LLAMA, "--cluster", "dgx-h100").machine == "h100-sxm (dgx-h100)"
    assert capsys.readouterr().err == ""
    study = parse(*LLAMA, "--cluster", "dgx-h200")
    assert study.machine == "h100-sxm (dgx-h200, a cluster of h200-sxm)"
    assert "note: cluster dgx-h200 is described with h200-sxm" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu", "cluster"), [("h100-sxm", "cpu-host"), ("cpu-core", "dgx-h100")])
def test_cpu_processes_are_no_cluster_of_gpus(gpu: str, cluster: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster: must be of CPU processes .* got cluster={cluster}, gpu={gpu}"):
        parse("--preset", "llama3-8b", "--gpu", gpu, "--cluster", cluster, "--gpus", "8")


def test_a_hugging_face_model_has_no_recipe() -> None:
    study = parse("--hf-config", "folder/config.json", *MACHINE, "--global-batch-size", "256")
    assert (study.model.name, study.preset, study.hf_config) == ("tinyllama-1b1", None, "folder/config.json")
    assert (study.seq_length, study.precision, study.train_tokens) == (2048, "bf16", None)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ("--hf-config", "config.json", *MACHINE),
            ("global-batch-size:", "without a recipe", "got none", "--samples-per-gpu"),
        ),
        (("--preset", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "8;64"), ("gpus:", "whole numbers", "got '8;64'")),
        (
            (*LLAMA, "--pipeline-model-parallel-size", "two"),
            ("pipeline-model-parallel-size:", "whole numbers", "got 'two'"),
        ),
        ((*LLAMA, "--samples-per-gpu", "half"), ("samples-per-gpu:", "a fraction", "got 'half'", "1/4")),
        # As a fraction, which is exact, this number would need all memory.
        ((*LLAMA, "--samples-per-gpu", "1e999999999"), ("samples-per-gpu:", "a fraction", "got '1e999999999'")),
        ((*LLAMA, "--train-tokens", "1e-999999999"), ("train-tokens:", "number of tokens", "got '1e-999999999'")),
        ((*LLAMA, "--train-tokens", "15X"), ("train-tokens:", "number of tokens", "got '15X'", "15T")),
        ((*LLAMA, "--recompute", "some,full"), ("recompute:", "none, selective, full", "got some.")),
        ((*LLAMA, "--sharding", "zero"), ("sharding:", "none, distributed_optimizer, fsdp", "got zero")),
        ((*LLAMA, "--top", "0"), ("top:", "at least 1", "got 0")),
    ],
)
def test_one_problem(flags: tuple[str, ...], problem: tuple[str, ...]) -> None:
    with raises_problem(ConfigError, *problem):
        parse(*flags)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*LLAMA, "--train-tokens", "x", "--sharding", "y", "--top", "0", "--seq-length", "0")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "train-tokens",
        "sharding",
        "top",
        "seq-length",
    ]


@pytest.mark.parametrize("text", ["0", "-5", "1e300", "1.7e308", "5e-324"])
def test_memories_that_no_gpu_has(text: str) -> None:
    with raises_problem(ConfigError, "memory-gib: must be above 0 and at most"):
        parse(*LLAMA, "--memory-gib", text)
