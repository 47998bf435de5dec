"""Which software a source is taken to have run, and the recipes that fill what its table left out."""

from pathlib import Path

import pytest

from megatron_hammer.scaling.hardware.catalogue import load_clusters, load_gpus
from megatron_hammer.scaling.published.run_table import RunRow
from megatron_hammer.scaling.published.software import load_known_software, select_recipe, select_software
from tests.helpers.run_tables import read_plan


def test_old_software_recomputes_without_flash_attention(tmp_path: Path) -> None:
    plan = read_plan(tmp_path, gpu_type="A100", precision="mixed fp16", recompute="full (uniform)", sharding="")
    assert (plan.has_flash_attention, plan.overlaps_grad_reduce, plan.sharding) == (False, False, "none")
    assert (plan.recompute, plan.gradient_bytes, plan.layout.has_sequence_parallel) == ("full", 2, False)
    plan = read_plan(tmp_path, gpu_type="A100", precision="bf16", recompute="full")
    assert (plan.has_flash_attention, plan.layout.has_sequence_parallel) == (True, True)


@pytest.mark.parametrize(
    ("source", "name", "is_megatron_style"),
    [
        ("Narayanan2021_SC21_Table1", "Megatron-LM of 2021", True),
        ("MegatronLM_README_2020_dataparallel", "Megatron-LM of 2020", True),
        ("MegatronLM_README_H100_weak", "Megatron-Core of the README", True),
        ("MegatronLM_CI_golden", "Megatron-LM CI", True),
        ("MT-NLG2022_s2.4", "Megatron-DeepSpeed of 2021", True),
        ("vTrain_ground_truth_single", "Megatron-DeepSpeed of vTrain", True),
        ("MegatronBridge_perf_26.06", "Megatron Bridge", True),
        ("NeMo_Launcher_24.05era", "NeMo Launcher", True),
        ("NVIDIA_dgxc-benchmarking_v24.11.1", "NeMo recipes", True),
        ("NVIDIA_dgxc-benchmarking_v25.05", "NeMo 2 recipes", True),
        ("NVIDIA_dgxc_MaxText_v25.02", "MaxText", False),
        ("NVIDIA_dgxc_PaxML_v24.11.1", "PaxML", False),
        ("MosaicML_llm-foundry_benchmarks", "MosaicML", False),
        ("torchtitan_2024-12", "torchtitan", False),
        ("HammerLLM_README", "Hugging Face Trainer", False),
        ("my own cluster", "Megatron-style of today", True),
        ("", "Megatron-style of today", True),
    ],
)
def test_the_software_of_a_source(source: str, name: str, is_megatron_style: bool) -> None:
    software, (assumption,) = select_software(RunRow(row_number=2, source=source), "h100-sxm")
    assert (software.name, software.is_megatron_style) == (name, is_megatron_style)
    assert software.source in assumption


def test_every_software_and_recipe_names_its_source() -> None:
    known = load_known_software()
    assert all(software.source and software.source_pattern for software in known.software)
    assert all(recipe.source for recipe in known.recipe)
    assert len({software.name for software in known.software}) == len(known.software) > 20


def test_clusters_and_gpus_of_software_exist() -> None:
    known = load_known_software()
    gpus, clusters = load_gpus(), load_clusters()
    for software in known.software:
        assert set(software.gpu_of_gpu) | set(software.gpu_of_gpu.values()) | set(software.cluster_of_gpu) <= set(gpus)
        assert set(software.cluster_of_gpu.values()) <= set(clusters)
    assert {recipe.gpu for recipe in known.recipe} <= set(gpus)


def test_a_recipe_fills_only_what_is_blank(tmp_path: Path) -> None:
    row = RunRow(row_number=2, source="NVIDIA_dgxc-benchmarking_v25.05", model="llama3.1-405b")
    recipe = select_recipe(row, "gb200")
    assert recipe is not None
    assert (recipe.tp, recipe.pp, recipe.cp, recipe.vpp) == (4, 8, 2, 8)
    assert select_recipe(row, "b200-sxm") is None
    blank = {
        name: "" for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "tp", "pp", "cp", "dp")
    }
    cells = blank | {"source": row.source, "model": row.model, "gpu_type": "GB200", "gpus": "128", "global_batch": ""}
    plan = read_plan(tmp_path, **cells, micro_batch="")
    assert (plan.layout.data_parallel_size, plan.global_batch_size, plan.seq_length) == (2, 64, 8192)
    assert read_plan(tmp_path, **(cells | {"cp": "1"}), micro_batch="").layout.data_parallel_size == 4


def test_the_gpu_of_its_year(tmp_path: Path) -> None:
    cells = {"source": "MegatronLM_README_2020_x", "gpu_type": "A100", "seq": "", "micro_batch": "", "precision": ""}
    plan = read_plan(tmp_path, **cells)
    assert (plan.gpu.name, plan.seq_length, plan.micro_batch_size) == ("a100-sxm-40gb", 1024, 8)
    assert (plan.cluster.name, plan.precision) == ("dgx-a100-40gb", "fp16")
