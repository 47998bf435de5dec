"""What a cell says of the host is predicted, refused by its words, or an assumption; never dropped."""

import dataclasses
from pathlib import Path

import pytest

from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.row_offload import read_offload
from megatron_hammer.scaling.published.run_table import RunRow
from tests.helpers.run_tables import read_one

ROW = RunRow(row_number=2)


@pytest.mark.parametrize(
    ("sharding", "cell", "expected"),
    [
        ("distributed_optimizer", "ZeRO-1 + offload", (1.0, 0)),
        ("distributed_optimizer", "ZeRO-Offload", (1.0, 0)),
        ("distributed_optimizer", "dist-opt (optimizer CPU offload 50%)", (0.5, 0)),
        ("fsdp", "ZeRO-3, optimizer offload 0.25", (0.25, 0)),
        ("fsdp", "FSDP=64 with activation offload of 20 layers", (0.0, 20)),
        ("fsdp", "FSDP; offload of the optimizer and activation offload of 3 layers", (1.0, 3)),
        ("fsdp", "offload_optimizer: cpu, offload_param: none", (1.0, 0)),
        ("fsdp", "FSDP, no offload", (0.0, 0)),
        ("none", "", (0.0, 0)),
    ],
)
def test_cells_that_say_enough(sharding, cell: str, expected: tuple[float, int]) -> None:
    assert read_offload(dataclasses.replace(ROW, sharding=cell), sharding, 24, []) == expected


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"sharding": "FSDP + CPU offload"}, "what of it is offloaded to the host is not stated: 'cpu offload'"),
        ({"sharding": "ZeRO-3, parameter offload"}, "parameters on the host are not modelled"),
        ({"sharding": "ZeRO-3, optimizer offload to NVMe"}, "on disks is not modelled"),
        ({"sharding": "FSDP + activation offload"}, "of how many layers the activations are offloaded"),
        ({"recompute": "selective + offload"}, "what of it is offloaded to the host"),
        ({"sharding": "activation offload of 24 layers"}, "not of 1 to 23 of its 24 layers"),
        ({"sharding": "ZeRO-1, optimizer offload 150%"}, "not above 0 and at most all of it"),
    ],
)
def test_cells_that_leave_it_open_are_refused(cells: dict[str, str], reason: str) -> None:
    with pytest.raises(UnpredictableError, match=reason):
        read_offload(dataclasses.replace(ROW, **cells), "fsdp", 24, [])


def test_a_run_with_its_optimizer_on_the_host_needs_less_memory_and_more_time(tmp_path: Path) -> None:
    run, plain = (read_one(tmp_path, sharding=cell).plan for cell in ("ZeRO-1, optim offload", "ZeRO-1"))
    assert (run.sharding, run.optimizer_offload_ratio) == ("distributed_optimizer", 1.0)
    assert read_one(tmp_path, sharding="ZeRO-3, optim offload").plan.sharding == "fsdp"
    with_host, without = estimate_heaviest_plan_stage(run), estimate_heaviest_plan_stage(plain)
    assert with_host.optimizer_bytes == 0 < without.optimizer_bytes
    assert with_host.host_bytes > without.host_bytes == 0
    assert predict_step(run, load_coefficients()).total_s > predict_step(plain, load_coefficients()).total_s


def test_remarks_in_the_notes_are_an_assumption(tmp_path: Path) -> None:
    run = read_one(tmp_path, notes="CPU offload for long contexts")
    assert run.plan.optimizer_offload_ratio == 0
    assert any("only the notes speak of it" in text for text in run.assumptions)
