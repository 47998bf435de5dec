"""Processes that srun starts, one for each GPU, without torchrun: they train together, and give torchrun's losses."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launched_runs import find_free_port
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, environment, read_lines, train, write_toy_data

pytestmark = pytest.mark.distributed


def test_tasks_of_srun_train_together(tmp_path: Path) -> None:
    data = ("--data-path", write_toy_data(tmp_path / "data"), "--split", "100,0,0")
    flags = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "4", *data, "--tensor-model-parallel-size", "2")
    by_torchrun = train(2, tmp_path / "torchrun.jsonl", *flags)
    metrics_path = tmp_path / "srun.jsonl"
    step = {
        **{"SLURM_JOB_ID": "4500123", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"},
        **{"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(find_free_port())},
    }
    command = [sys.executable, "-m", "megatron_hammer.training.pretrain", *flags, "--metrics-path", str(metrics_path)]
    tasks = [
        subprocess.Popen(
            command,
            env=environment() | step | {"SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in "01"
    ]
    for task in tasks:
        _, stderr = task.communicate(timeout=240)
        assert task.returncode == 0, stderr[-4000:]
    by_srun = read_lines(metrics_path)
    assert [line["loss"] for line in by_srun] == [line["loss"] for line in by_torchrun]
    assert [line["step"] for line in by_srun] == [1, 2, 3, 4]
