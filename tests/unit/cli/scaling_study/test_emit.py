"""What a launch needs of its row."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study.emit import build_row_launch, check_network
from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.launch.launch_scripts import KubernetesOptions
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.report.projection_file import SavedProjection, SavedRow


def build_projection(*row_ids: str) -> SavedProjection:
    plan = Plan(
        model=PRESETS["llama3-8b"].model, layout=ParallelLayout(data_parallel_size=8), gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"), seq_length=8192, micro_batch_size=1, global_batch_size=8,
    )  # fmt: skip
    rows = tuple(
        SavedRow(
            row_id=row_id, num_gpus=8, rank=int(row_id.partition("-")[2]), plan=plan, step_time_s=2.0, low_s=1.5,
            high_s=2.5,
        )
        for row_id in row_ids
    )  # fmt: skip
    return SavedProjection(path=Path("projection.json"), train_tokens=None, rows=rows)


def test_network_cards_are_for_gpus_only() -> None:
    (row,) = build_projection("8-1").rows
    launch = build_row_launch(build_projection("8-1"), row)
    options = KubernetesOptions(rdma=("rdma/ib", 1))
    check_network([launch], options)
    cpu = replace(row.plan, gpu=select_gpu("cpu-core"), cluster=select_cluster("cpu-host"))
    check_network([replace(launch, plan=cpu)], KubernetesOptions())
    with pytest.raises(ConfigError, match=r"rdma: must be given for rows of GPUs only.*got llama3-8b-8-1"):
        check_network([launch, replace(launch, plan=cpu)], options)


def test_a_model_that_can_only_be_studied_gets_no_launch() -> None:
    projection = build_projection("8-1")
    (row,) = projection.rows
    studied = replace(row.plan.model, has_attention_sinks=True, activation="clamped_swiglu")
    with pytest.raises(ConfigError, match=r"has_attention_sinks: .*not trained here") as caught:
        build_row_launch(projection, replace(row, plan=replace(row.plan, model=studied)))
    assert len(caught.value.problems) == 2
