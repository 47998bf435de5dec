"""What the training examples start on a machine with GPUs and under SLURM: driver and launcher are stand-ins."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.parsed_flags import find, parse, plan, write_data
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.integration

# Writes down what the launcher would be given; everything else is done by Python.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *megatron_hammer.training.launch*) printf '%s\\0' "$@" >"$WORDS" ;;
    *megatron_to_hf.py* | *generate_sample.py*) ;;
    *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
NVIDIA_SMI = """#!/usr/bin/env bash
for ((gpu = 0; gpu < NUM_GPUS; gpu++)); do echo "GPU $gpu: NVIDIA H100 80GB HBM3 (UUID: GPU-$gpu)"; done
"""
DEMO_FILES = ("corpus.jsonl", "valid.jsonl", "tokenizer.model", "train_text_document.idx", "valid_text_document.idx")
IN_STEP = {
    "SLURM_JOB_ID": "4500123",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "n[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_NODEID": "1",
}


class Machine:
    """A copy of the examples beside stand-ins, with demonstration data that exists already."""

    def __init__(self, folder: Path):
        self.folder, self.words_path, self.output_dir = folder, folder / "words", folder / "out"
        (folder / "tools").mkdir()
        (folder / "examples").mkdir()
        for script in (ROOT / "examples").glob("*.sh"):
            (folder / "examples" / script.name).write_text(script.read_text())
        (folder / "tools" / "setup_environment.sh").write_text(f"export PYTHON={shlex.quote(str(folder / 'python'))}\n")
        for name, text in (("python", PYTHON), ("nvidia-smi", NVIDIA_SMI)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (self.output_dir / "data").mkdir(parents=True)
        for name in DEMO_FILES:
            (self.output_dir / "data" / name).write_text("kept as it is")

    def run(self, script: str, *flags: str, num_gpus: int = 8, **variables: str) -> subprocess.CompletedProcess[str]:
        unset = ("SLURM", "MASTER", "NODE", "NNODES", "NPROC", "CUDA_VISIBLE", "DATA_PATH", "TP", "PP")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        environment |= {
            "PATH": f"{self.folder}:{environment['PATH']}",
            "PYTHONPATH": str(ROOT),
            "WORDS": str(self.words_path),
            "OUTPUT_DIR": str(self.output_dir),
            "NUM_GPUS": str(num_gpus),
            **variables,
        }
        command = ["bash", str(self.folder / "examples" / script), *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def launch(self, script: str, *flags: str, num_gpus: int = 8, **variables: str) -> tuple[list[str], list[str]]:
        """The options of the launcher, and those of training."""
        result = self.run(script, *flags, num_gpus=num_gpus, **variables)
        assert result.returncode == 0, result.stderr
        words = self.words_path.read_text().split("\0")[:-1]
        split = words.index("--")
        return words[2:split], words[split + 1 :]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_data_the_whole_model_gets_a_demonstration(machine: Machine) -> None:
    result = machine.run("pretrain_hammer_1b4.sh")
    assert "DATA_PATH is not set: a demonstration. The 1.4B model trains for 48 steps" in result.stdout
    launcher, training = machine.launch("pretrain_hammer_1b4.sh", "--lr", "1e-4", "--train-samples", "320")
    assert launcher == ["--nproc-per-node", "8", "--max-restarts", "100", "--standalone"]
    assert training[:2] == ["--preset", "hammer-1b4-demo"]
    assert training[training.index("--platform") + 1] == "cuda"
    namespace = parse(*training, *plan(8), platform="cuda").namespace
    assert (namespace.train_iters, namespace.train_samples, namespace.lr) == (None, 320, 1e-4), "typed flags must win"


def test_the_demonstration_is_a_run_that_fits_the_data(machine: Machine) -> None:
    """As many tokens as examples/demo_data.sh makes: 2 to 3 million to train with, some thousand to evaluate with."""
    data = machine.output_dir / "data"
    for name in ("train", "valid"):
        (data / f"{name}_text_document.idx").unlink()
        write_data(data / f"{name}_text_document", [1000] * (2500 if name == "train" else 10))
    _, training = machine.launch("pretrain_hammer_1b4.sh")
    tokenizer = training.index("--tokenizer-model")  # a text file here
    flags = (*training[:tokenizer], *training[tokenizer + 2 :], *plan(8))
    assert find(*flags, platform="cuda") == []
    run = parse(*flags, platform="cuda").require_plan()
    assert (run.num_steps, run.schedule.lr_warmup, run.evaluation.interval_steps) == (48, 5, 12)
    assert 1 < run.num_samples["train"] * run.seq_length / 2.5e6 < 1.5
    assert run.num_samples["valid"] == 5 * 32, "five evaluations of one batch"
    assert replace(run.model, name="", source="") == replace(PRESETS["hammer-1b4"].model, name="", source="")


@pytest.mark.parametrize(("num_gpus", "batch"), [(1, "32"), (3, "30"), (8, "32"), (12, "24"), (48, "48")])
def test_the_batch_of_the_demonstration_suits_the_number_of_gpus(machine: Machine, num_gpus: int, batch: str) -> None:
    _, training = machine.launch("pretrain_hammer_1b4.sh", num_gpus=num_gpus)
    assert training[training.index("--global-batch-size") + 1] == batch


def test_own_data_gets_the_whole_recipe(machine: Machine) -> None:
    _, training = machine.launch("pretrain_hammer_1b4.sh", DATA_PATH="3 a 1 b", TP="2")
    assert training[training.index("--preset") + 1] == "hammer-1b4"
    assert "--global-batch-size" not in training
    assert " ".join(training).endswith("--data-path 3 a 1 b")
    assert training[training.index("--tensor-model-parallel-size") + 1] == "2"


@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({}, "--keep-last 3 --keep-every 50000"),
        ({"KEEP_LAST": "5", "KEEP_EVERY": "100"}, "--keep-last 5 --keep-every 100"),
        ({"KEEP_LAST": ""}, None),
    ],
)
def test_the_example_does_not_keep_every_checkpoint(
    machine: Machine, variables: dict[str, str], kept: str | None
) -> None:
    _, training = machine.launch("pretrain_hammer_1b4.sh", DATA_PATH="a", **variables)
    words = " ".join(training)
    assert ("--keep" not in words) if kept is None else (kept in words)


@pytest.mark.parametrize(
    ("visible", "num_processes"), [("", "2"), ("0,1,2", "3"), ("GPU-7,GPU-1", "2"), ("1,-1,2", "1"), ("MIG-1", "2")]
)
def test_only_visible_gpus_are_counted(machine: Machine, visible: str, num_processes: str) -> None:
    launcher, training = machine.launch("pretrain_hammer_1b4.sh", CUDA_VISIBLE_DEVICES=visible)
    assert launcher[:2] == ["--nproc-per-node", num_processes]
    is_cpu = visible in ("", "MIG-1")
    assert training[training.index("--preset") + 1] == ("hammer-tiny" if is_cpu else "hammer-1b4-demo")


def test_a_continued_model_without_data_is_a_demonstration_too(machine: Machine) -> None:
    _, training = machine.launch("continue_from_hf.sh", HF_DIR="model")
    values = {flag: training[training.index(flag) + 1] for flag in ("--train-iters", "--seq-length", "--load-hf")}
    assert values == {"--train-iters": "48", "--seq-length": "1024", "--load-hf": "model"}
    _, training = machine.launch("continue_from_hf.sh", HF_DIR="model", DATA_PATH="a")
    assert training[training.index("--train-iters") + 1] == "1000"


@pytest.mark.parametrize("script", ["pretrain_hammer_1b4.sh", "continue_from_hf.sh"])
def test_a_node_of_a_slurm_step(machine: Machine, script: str) -> None:
    """The step's nodes, and a port that follows from the job's number; the user's variables win."""
    launcher, _ = machine.launch(script, DATA_PATH="a", HF_DIR="model", **IN_STEP)
    assert launcher == [
        *("--nproc-per-node", "8", "--max-restarts", "100", "--nnodes", "2", "--node-rank", "1"),
        *("--master-addr", "n07", "--master-port", "10123"),
    ]
    own = {"MASTER_ADDR": "here", "MASTER_PORT": "7", "NODE_RANK": "0"}
    launcher, _ = machine.launch(script, DATA_PATH="a", HF_DIR="model", **IN_STEP | own)
    assert launcher[6:] == ["--node-rank", "0", "--master-addr", "here", "--master-port", "7"]


def test_one_node_of_a_larger_job_is_enough(machine: Machine) -> None:
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n08", "SLURM_NODEID": "0"}
    launcher, _ = machine.launch("pretrain_hammer_1b4.sh", **IN_STEP | one)
    assert launcher == ["--nproc-per-node", "8", "--max-restarts", "100", "--standalone"]


@pytest.mark.parametrize(
    "name", ["NNODES", "NPROC", "MAX_RESTARTS", "SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"]
)
@pytest.mark.parametrize("value", ["PATH[$(touch ran)]", "08", "1e3", "99999999999"])
def test_a_number_that_is_none_is_refused_before_bash_computes_with_it(
    machine: Machine, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arithmetic in bash runs the command of the first value, and reads the second one as octal."""
    monkeypatch.chdir(machine.folder)
    result = machine.run("pretrain_hammer_1b4.sh", **{name: value})
    assert (result.returncode, machine.words_path.exists(), (machine.folder / "ran").exists()) == (2, False, False)
    assert result.stderr.startswith(f"error: {name}: must be a whole number")
    assert f"got {value}." in result.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-2]"},
            "SLURM: every node of the job must run this script, got one run of it for 2 nodes. Start it with srun: "
            "srun --nodes 2 --ntasks-per-node 1 bash ",
        ),
        (
            IN_STEP | {"SLURM_STEP_NUM_TASKS": "16"},
            "srun: must start this script once on each node, got 16 tasks on 2 nodes.",
        ),
        ({"NNODES": "4"}, "NODE_RANK: must be the number of this node, counted from 0, got none for NNODES=4."),
        ({"NNODES": "4", "NODE_RANK": "1"}, "MASTER_ADDR: must be the host of node 0, got none for NNODES=4. Set it."),
        (IN_STEP | {"DATA_PATH": ""}, "DATA_PATH: must be set for a run on several nodes, got none for 2 nodes."),
    ],
)
def test_what_cannot_start_is_refused_at_once(machine: Machine, variables: dict[str, str], message: str) -> None:
    result = machine.run("pretrain_hammer_1b4.sh", **{"DATA_PATH": "a", **variables})
    assert (result.returncode, machine.words_path.exists()) == (2, False)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
