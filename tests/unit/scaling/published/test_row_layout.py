"""The layout of a row with blanks: from other rows, from the software of its source, or from what fits in memory."""

from pathlib import Path

import pytest

from megatron_hammer.scaling.published.measured_runs import read_runs
from tests.helpers.run_tables import COLUMNS, read_one, read_plan, write_table


def test_126_layers_over_eight_interleaved_stages_count_embedding_and_loss(tmp_path: Path) -> None:
    cells = {"model": "llama3-405b", "layers": "126", "hidden": "16384", "heads": "128", "kv_heads": "8"}
    run = read_one(tmp_path, **cells, ffn="53248", vocab="128256", tp="8", pp="8", vpp="8", gpus="128", dp="2")
    layout = run.plan.layout
    assert layout.accounts_for_embedding
    assert layout.accounts_for_loss
    assert layout.virtual_pipeline_model_parallel_size == 8
    even = read_plan(tmp_path, **cells, ffn="53248", vocab="128256", tp="8", pp="9", vpp="7", gpus="144", dp="2").layout
    assert not even.accounts_for_embedding


def test_a_blank_layout_is_filled_from_another_row_of_its_source(tmp_path: Path) -> None:
    blank = {"tp": "", "pp": "", "dp": "", "gpus": "32"}
    runs, unpredictable = read_runs(write_table(tmp_path / "two.csv", {}, blank))
    assert unpredictable == []
    assert (runs[1].plan.layout.tensor_model_parallel_size, runs[1].plan.layout.data_parallel_size) == (2, 16)
    assert "tp 2, pp 1: the layout of the source's other row of this model" in runs[1].assumptions


def test_a_blank_layout_of_sharded_weights_is_data_parallel(tmp_path: Path) -> None:
    cells = {"tp": "", "pp": "", "cp": "", "dp": "", "source": "elsewhere"}
    run = read_one(tmp_path, **cells, sharding="ZeRO-3")
    assert run.plan.layout.data_parallel_size == 16
    assert "tp 1, pp 1: blank, ZeRO-3 splits the model" in run.assumptions
    _, (refused,) = read_runs(write_table(tmp_path / "one.csv", cells | {"sharding": "ZeRO-1"}))
    assert refused.reason.startswith("tp and pp blank")


def test_a_blank_vpp_of_an_interleaving_source(tmp_path: Path) -> None:
    cells = {"source": "NeMo_suite_v1.2", "pp": "4", "gpus": "64", "vpp": ""}
    assert read_plan(tmp_path, **cells).layout.virtual_pipeline_model_parallel_size == 6  # all layers of a stage
    given = cells | {"source": "NeMo_suite_v1.3", "vpp": "3"}
    runs, _ = read_runs(write_table(tmp_path / "two.csv", cells, given))
    assert [run.plan.layout.virtual_pipeline_model_parallel_size for run in runs] == [3, 3]
    assert "vpp 3: blank, that of the source's other row of this model and layout" in runs[0].assumptions
    # 126 layers, with the embedding and the loss, are 8 per stage (arXiv 2407.21783, section 3.3.2).
    llama = cells | {"source": "Llama3_paper", "layers": "126", "pp": "16", "gpus": "256"}
    assert read_plan(tmp_path, **llama).layout.virtual_pipeline_model_parallel_size == 8
    unknown = cells | {"source": "team_a"}
    assert read_plan(tmp_path, **unknown).layout.virtual_pipeline_model_parallel_size == 1


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"source": "Korthikanti2022_T5", "recompute": "full"}, False),
        ({"source": "Korthikanti2022_T5", "recompute": "selective"}, True),
        ({"source": "Korthikanti2022_T5", "recompute": "selective", "notes": "no sequence parallelism"}, False),
        ({"source": "Korthikanti2022_T5", "recompute": "full, sequence parallel"}, True),
        ({"source": "Narayanan2021"}, False),
        ({"source": "team_a", "recompute": "full"}, True),
        ({"source": "team_a", "tp": "1", "dp": "16"}, False),
    ],
)
def test_sequence_parallelism_of_each_stack(tmp_path: Path, cells: dict[str, str], expected: bool) -> None:
    assert read_plan(tmp_path, **cells).layout.has_sequence_parallel is expected


def test_source_families(tmp_path: Path) -> None:
    names = {
        "Suite_perf_26.04.01": "Suite_perf",
        "Lab-bench_v25.02": "Lab-bench",
        "Paper2021_Table1": "Paper2021_Table1",
    }
    for name, family in names.items():
        assert read_one(tmp_path, source=name).source_family == family


def test_layers_that_no_rule_splits_are_shared_out_over_the_chunks(tmp_path: Path) -> None:
    cells = {"layers": "61", "pp": "8", "vpp": "4", "gpus": "128", "experts": "8", "topk": "2", "moe_ffn": "1024"}
    columns = [*COLUMNS, "experts", "topk", "moe_ffn", "mtp_layers"]
    path = write_table(tmp_path / "one.csv", cells | {"mtp_layers": "1", "ffn": ""}, columns=columns)
    (run,), _ = read_runs(path)
    chunks = run.plan.layout.chunk_layers
    assert chunks is not None
    # 64 places for 61 layers, the embedding, the head and the layer for a further token
    assert (len(chunks), sum(chunks), chunks[0], chunks[-1]) == (32, 61, 1, 0)
    assert any("shared out as evenly" in text for text in run.assumptions)
    # nanotron's 80 layers over 32 stages
    dense = read_plan(tmp_path, layers="80", pp="32", gpus="64", dp="1").layout.chunk_layers
    assert dense is not None
    assert (len(dense), sum(dense), max(dense), min(dense)) == (32, 80, 3, 1)
    few = write_table(tmp_path / "few.csv", {"layers": "5", "pp": "8", "gpus": "16", "dp": "1"})
    assert read_runs(few)[1][0].reason.startswith("its 5 layers cannot be split")
