"""Emitted scripts under shellcheck, run by bash, and their commands under the project's own dry run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.launch.launch_scripts import SUFFIXES, build_launch, render
from megatron_hammer.scaling.plan import Plan
from tests.helpers.messages import assert_errors
from tests.helpers.parsed_flags import find
from tests.helpers.repository import ROOT
from tests.helpers.tool_runs import Finished, run_tool
from tests.helpers.training_runs import environment

pytestmark = pytest.mark.integration
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")

# name: (preset, (tp, pp, dp), further sizes of the layout, further fields of the plan)
ROWS: dict[str, tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = {
    "one-node": ("hammer-1b4", (1, 1, 8), {}, {"seq_length": 2048, "global_batch_size": 1024, "micro_batch_size": 4}),
    "interleaved": ("llama3-70b", (8, 4, 4), {"virtual_pipeline_model_parallel_size": 5}, {}),
    "uneven": ("llama3-8b", (2, 3, 8), {"num_layers_first_stage": 10, "num_layers_last_stage": 10}, {}),
    "recompute": ("llama2-70b", (8, 2, 4), {}, {"seq_length": 4096, "recompute": "full"}),
    "selective": ("llama3-8b", (4, 1, 4), {}, {"recompute": "selective", "gradient_bytes": 2}),
    "fsdp": ("llama3-8b", (1, 1, 16), {}, {"sharding": "fsdp", "shard_size": 8}),
    "instances": ("llama3-8b", (2, 1, 16), {}, {"shard_size": 8}),
    "long": ("tinyllama-1b1", (2, 1, 4), {}, {"seq_length": 8192}),
    "unsharded": ("hammer-1b4", (2, 2, 2), {"has_distributed_optimizer": False}, {"sharding": "none"}),
    "hugging-face": ("own", (4, 1, 4), {}, {}),
}  # fmt: skip
NEEDS_TE: dict[str, tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = {
    "context": ("llama3-8b", (2, 1, 1), {"context_parallel_size": 8}, {"context_exchange": "a2a+p2p"}),
    "fp8": ("llama3-70b", (4, 4, 1), {}, {"precision": "fp8_blockwise"}),
}


SWEEP = ("--lr 3e-4", "--lr 1e-4 --wandb-exp-name 'two words'")


def build_script(name: str, launcher: Any) -> tuple[str, int]:
    """(text, world size) of a row of ROWS or NEEDS_TE on H100s."""
    preset, sizes, layout, changes = (ROWS | NEEDS_TE)[name]
    model = PRESETS[preset].model if preset != "own" else build_own_model()
    plan = Plan(
        model=model,
        layout=ParallelLayout(**dict(zip(SIZES, sizes, strict=True)), has_sequence_parallel=sizes[0] > 1, **layout),
        gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"),
        **{"seq_length": 8192, "micro_batch_size": 1, "global_batch_size": 128, **changes},
    )
    launch = build_launch(
        plan,
        model_arguments=build_model_arguments(plan.model),
        name=f"{model.name}-{name}",
        train_tokens=None,
        comment=f"row {name}",
    )
    return render(launch, launcher, sweep=SWEEP), launch.num_nodes * launch.processes_per_node


def build_own_model() -> Any:
    from dataclasses import replace

    return replace(PRESETS["llama3-8b"].model, name="own", num_layers=24)


def list_words(script: Path, tmp_path: Path, *flags: str, **variables: str) -> list[str]:
    """What the script hands to python: a stand-in writes down its arguments."""
    words = tmp_path / "words"
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$WORDS"\nenv >"$WORDS.env"\n')
    python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER", "NODE"))}
    environment |= {"PYTHON": str(python), "WORDS": str(words), **variables}
    result = subprocess.run(
        ["bash", str(script), *flags], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return words.read_text().split("\0")[:-1]


def write_script(name: str, launcher: Any, tmp_path: Path) -> Path:
    path = tmp_path / f"launch{SUFFIXES[launcher]}"
    path.write_text(build_script(name, launcher)[0])
    return path


def adopt_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script exported for Megatron, which preflight looks at on a machine with a GPU."""
    variables = dict(line.split("=", 1) for line in (tmp_path / "words.env").read_text().splitlines() if "=" in line)
    if "CUDA_DEVICE_MAX_CONNECTIONS" in variables:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", variables["CUDA_DEVICE_MAX_CONNECTIONS"])


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("uneven", "torchrun"), ("context", "torchrun"), ("context", "slurm"), ("uneven", "slurm-array")],
)
def test_shellcheck(name: str, launcher: str, tmp_path: Path) -> None:
    checker = Path(sys.executable).parent / "shellcheck"
    if not checker.exists() and shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing; bash tests/run.sh installs it")
    path = write_script(name, launcher, tmp_path)
    command = [str(checker) if checker.exists() else "shellcheck", "--shell=bash", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ROWS)
def test_dry_run_accepts_every_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of DRY_RUN=1 are those of the run, planned at the row's number of processes, and have no problem."""
    world_size = build_script(name, "torchrun")[1]
    words = list_words(write_script(name, "torchrun", tmp_path), tmp_path, DRY_RUN="1")
    assert words[:2] == ["-m", "megatron_hammer.training.pretrain"]
    assert words[-3:] == ["--dry-run", "--world-size", str(world_size)]
    adopt_connections(tmp_path, monkeypatch)
    assert find(*words[2:], platform="cuda") == []


@pytest.mark.parametrize("name", NEEDS_TE)
def test_dry_run_of_rows_for_transformer_engine(name: str, tmp_path: Path) -> None:
    """Whether or not this machine has TransformerEngine: the cluster of the plan does."""
    words = list_words(write_script(name, "torchrun", tmp_path), tmp_path, DRY_RUN="1")
    assert words[words.index("--backend") + 1] == "te"
    assert find(*words[2:], platform="cuda", backend="te") == []


def test_dry_run_as_a_user_types_it(tmp_path: Path) -> None:
    """The whole command, in a process of its own: FSDP, which must not have the connections that others need."""
    script = write_script("fsdp", "torchrun", tmp_path)
    variables = environment() | {"DRY_RUN": "1", "PYTHON": sys.executable, "HAMMER_ROOT": str(ROOT)}
    variables.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    result = subprocess.run(
        ["bash", str(script), "--backend", "torch"], env=variables, capture_output=True, text=True, cwd=tmp_path,
        timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "dry run: 0 problems, nothing was started"


def test_torchrun_on_several_nodes(tmp_path: Path) -> None:
    script = write_script("interleaved", "torchrun", tmp_path)
    words = list_words(script, tmp_path, "--seed", "7", NODE_RANK="3", MASTER_ADDR="host0", TRAIN_ITERS="50")
    launch, training = words[: words.index("--")], words[words.index("--") + 1 :]
    assert launch[:2] == ["-m", "megatron_hammer.training.launch"]
    assert launch[2:] == [
        *("--nproc-per-node", "8", "--max-restarts", "100", "--nnodes", "16", "--node-rank", "3"),
        *("--master-addr", "host0", "--master-port", "29500"),
    ]  # fmt: skip
    assert training[-2:] == ["--seed", "7"]
    assert training[training.index("--train-iters") + 1] == "50"
    assert "--mock-data" in training


def test_one_node_reads_data(tmp_path: Path) -> None:
    words = list_words(
        write_script("one-node", "torchrun", tmp_path), tmp_path, DATA_PATH="3 a 1 b", TOKENIZER_MODEL="t.model"
    )
    assert "--standalone" in words
    assert words[words.index("--data-path") :][:7] == [
        "--data-path",
        "3",
        "a",
        "1",
        "b",
        "--tokenizer-model",
        "t.model",
    ]
    assert "--mock-data" not in words


def study(*words: str) -> Finished:
    return run_tool("tools/scaling_study.py", *words)


def test_rows_of_a_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `project` to a script whose command the dry run accepts; unknown rows and launchers are named."""
    path = tmp_path / "projection.json"
    project = study(
        *("project", "--preset", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "8,64", "--top", "2", "--json")
    )
    assert project.returncode == 0, project.stderr
    path.write_text(project.stdout)
    emit = ("emit", "--projection", str(path), "--output-dir", str(tmp_path / "jobs"))
    (tmp_path / "sweep.txt").write_text("# learning rates\n\n--lr 3e-4\n--lr '1e-4'  # the smaller one\n")
    options = ("--sweep", str(tmp_path / "sweep.txt"), "--rdma", "rdma/ib=8", "--queue", "big")
    result = study(*emit, "--launcher", "jobset,torchrun,kubernetes,trainjob,slurm-array", *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "2 rows of 4 emitted, 10 files"
    endings = ("-jobset.yaml", "-sweep.sbatch", "-trainjob.yaml", ".sh", ".yaml")
    names = [f"llama3-8b-{size}-1{ending}" for size in (64, 8) for ending in endings]
    assert sorted(file.name for file in (tmp_path / "jobs").iterdir()) == sorted(names)
    assert "    2) task_flags=(--lr 1e-4) ;;" in (tmp_path / "jobs" / "llama3-8b-8-1-sweep.sbatch").read_text()
    assert "rdma/ib: 8" in (tmp_path / "jobs" / "llama3-8b-8-1.yaml").read_text()
    words = list_words(tmp_path / "jobs" / "llama3-8b-64-1.sh", tmp_path, DRY_RUN="1")
    adopt_connections(tmp_path, monkeypatch)
    backend = words[words.index("--backend") + 1]
    assert find(*words[2:], platform="cuda", backend="te" if backend == "te" else "torch") == []
    assert words[-1] == "64"

    slurm = study(*emit, "--rows", "8-2", "--launcher", "slurm")
    assert slurm.stdout == f"{tmp_path / 'jobs' / 'llama3-8b-8-2.sbatch'}\n"
    unknown = study(*emit, "--rows", "8-7")
    assert unknown.returncode == 2
    assert "must hold the row that is asked for, got row='8-7'. Use one of: 8-1, 8-2, 64-1, 64-2." in unknown.stderr
    launcher = study(*emit, "--launcher", "torchrun,lsf")
    assert launcher.returncode == 2
    assert_errors(launcher.stderr, ("launcher:", "must be of torchrun", "got lsf"))
    idle = study(*emit, "--launcher", "slurm", "--queue", "big", "--sweep", "sweep.txt")
    assert idle.returncode == 2
    assert_errors(
        idle.stderr,
        ("queue:", "must be given with a launcher of Kubernetes, got launcher=slurm"),
        ("sweep:", "must be given with the launcher slurm-array", "sweep=sweep.txt, launcher=slurm"),
    )
