"""Contradictory cells of a row are named, and rows whose cells agree have none."""

from pathlib import Path

import pytest

from megatron_hammer.model.accounting import count_flops_per_token, count_parameters
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_RUNS_PATH
from tests.helpers.run_tables import read_one

TOKENS = 64 * 2048  # of one step of the complete row, on 16 GPUs in 0.7 s


def find(tmp_path: Path, **cells: str) -> tuple[str, ...]:
    return read_one(tmp_path, **cells).contradictions


def test_cells_that_agree(tmp_path: Path) -> None:
    plan = read_one(tmp_path).plan
    size = f"{count_parameters(plan.model) / 1e9:.1f}"
    tokens_per_s = TOKENS / 0.7 / 16
    flops = tokens_per_s * count_flops_per_token(plan.model, 2048, "B")
    assert find(tmp_path, params_B=size, tokens_per_s_per_gpu=f"{tokens_per_s:.0f}") == ()
    assert find(tmp_path, tflops_per_gpu=f"{flops / 1e12:.0f}", mfu=f"{flops / 989e12:.2f}") == ()


@pytest.mark.parametrize(
    ("cells", "start"),
    [
        ({"params_B": "1.5"}, "params_B 1.5: 24 layers of width 2048"),
        ({"global_batch": "65", "iteration_time_s": "0.7"}, "global_batch 65: no multiple of micro_batch 2 x dp 8"),
        ({"tokens_per_s_per_gpu": "9000"}, "iteration_time_s 0.7: tokens_per_s_per_gpu and the batch give 0.9102 s"),
        ({"tflops_per_gpu": "900"}, "tflops_per_gpu 900: the measured time gives"),
        ({"mfu": "0.9"}, "mfu 0.9: the measured time gives"),
        ({"iteration_time_s": "0.0007"}, "iteration_time_s 0.0007: "),  # in thousands of seconds
        ({"iteration_time_s": "", "tokens_per_s_per_gpu": "1e6"}, "tokens_per_s_per_gpu 1e+06: "),
        ({"iteration_time_s": "", "tflops_per_gpu": "1200"}, "tflops_per_gpu 1200: 1200 TFLOP/s, beyond the 989"),
        ({"iteration_time_s": "", "mfu": "45"}, "mfu 45: "),  # per cent
        ({"pp": "4", "dp": "2", "vpp": "3", "global_batch": "8"}, "vpp 3: interleaving needs at least pp 4"),
    ],
)
def test_each_contradiction(tmp_path: Path, cells: dict[str, str], start: str) -> None:
    (sentence,) = find(tmp_path, **cells)
    assert sentence.startswith(start)


def test_a_batch_need_not_be_a_multiple_of_the_stages_of_an_interleaved_pipeline(tmp_path: Path) -> None:
    run = read_one(tmp_path, pp="4", dp="2", vpp="3", global_batch="36")
    assert run.plan.layout.virtual_pipeline_model_parallel_size == 3
    assert run.plan.num_microbatches == 9
    assert run.contradictions == ()


def test_published_rows() -> None:
    """One model is larger than its name says; Modalities' MFU is 1.1 times that of its times."""
    rows = [run for run in read_runs(PUBLISHED_RUNS_PATH)[0] if run.contradictions]
    assert {run.source for run in rows} == {"NeMo_Launcher_24.05era", "Modalities_README_scaling"}
    assert sum(run.contradictions[0].startswith("mfu") for run in rows) == len(rows) - 1
