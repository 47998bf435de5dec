"""How experts were computed: cells of published_moe.csv, and the rules for blank ones."""

import pytest

from megatron_hammer.scaling.plan import ExpertOptions
from megatron_hammer.scaling.published.row_experts import (
    collect_dispatchers,
    read_cuda_graphs,
    read_expert_options,
    read_recompute_modules,
)
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.run_table import RunRow
from megatron_hammer.scaling.published.software import load_known_software

UNKNOWN = load_known_software().unknown


def test_the_cells_of_a_row() -> None:
    row = RunRow(
        row_number=2, experts=8, dispatcher="hybridep", overlap_ep=True, routing="force_balanced_dropless",
        notes="grouped GEMM off",
    )  # fmt: skip
    assumptions: list[str] = []
    options = read_expert_options(row, UNKNOWN, collect_dispatchers([]), assumptions)
    assert options == ExpertOptions(dispatcher="hybridep", overlaps_communication=True, has_grouped_gemm=False)
    assert assumptions == []


def test_a_blank_dispatcher_is_that_of_the_same_source_and_gpu() -> None:
    blank = RunRow(row_number=2, source="a", gpu_type="GB200", experts=8)
    others = [
        RunRow(row_number=3, source="a", gpu_type="GB200", dispatcher="deepep"),
        RunRow(row_number=4, source="a", gpu_type="B200", dispatcher="alltoall"),
    ]
    assumptions: list[str] = []
    options = read_expert_options(blank, UNKNOWN, collect_dispatchers(others), assumptions)
    assert options.dispatcher == "deepep"
    assert any(text.startswith("dispatcher deepep: blank, that of the source") for text in assumptions)
    assert any("taken as balanced" in text for text in assumptions)
    two = [*others, RunRow(row_number=5, source="a", gpu_type="GB200", dispatcher="alltoall")]
    assert read_expert_options(blank, UNKNOWN, collect_dispatchers(two), []).dispatcher == UNKNOWN.dispatcher


def test_an_unknown_dispatcher_is_refused() -> None:
    row = RunRow(row_number=2, experts=8, dispatcher="pigeon")
    with pytest.raises(UnpredictableError, match="dispatcher 'pigeon' is not known"):
        read_expert_options(row, UNKNOWN, collect_dispatchers([]), [])


@pytest.mark.parametrize(
    ("text", "graphs"),
    [
        ("none", "none"), ("", "none"), ("full_iteration", "step"), ("te:moe_router+moe_preprocess", "router"),
        ("te:attn+moe_router+moe_preprocess", "attention"), ("yes (scope not recorded)", "none"),
    ],
)  # fmt: skip
def test_cuda_graphs(text: str, graphs: str) -> None:
    assert read_cuda_graphs(RunRow(row_number=2, experts=8, cuda_graphs=text), []) == graphs


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("none", ("core_attn",)), ("selective", ("core_attn",)),
        ("selective: moe_act+layernorm", ("layernorm", "moe_act")),
        ("selective: up_proj+norm+moe+mlp", ("layernorm", "mla_up_proj", "mlp", "moe")),
        ("selective: mlp+mla_up_proj (App. B.2)", ("mla_up_proj", "mlp")),
    ],
)  # fmt: skip
def test_recomputed_modules(text: str, modules: tuple[str, ...]) -> None:
    assert read_recompute_modules(RunRow(row_number=2, recompute=text)) == modules


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(UnpredictableError, match="module 'dreams' is not known"):
        read_recompute_modules(RunRow(row_number=2, recompute="selective: dreams"))
