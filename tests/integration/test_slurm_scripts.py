"""The SLURM scripts of examples/slurm/, run for real. SLURM is a stand-in; so is the launcher, except in one test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.launch.launch_scripts import build_launch, render
from megatron_hammer.scaling.plan import Plan
from tests.helpers.parsed_flags import find
from tests.helpers.repository import ROOT
from tests.helpers.slurm_stand_in import Slurm, read_directives
from tests.helpers.training_runs import read_lines

pytestmark = pytest.mark.integration

PRETRAIN, SWEEP = (ROOT / "examples" / "slurm" / name for name in ("pretrain.sbatch", "sweep.sbatch"))
# The launcher of one node: notes what it was given, then does what the test says. `save` is what node 0 does.
PYTHON = """#!/usr/bin/env bash
folder="$SLURM_STAND_IN/node-$SLURM_NODEID-attempt-${SLURM_RESTART_COUNT:-0}"
mkdir -p "$folder"
printf '%s\\0' "$@" >"$folder/words"
env >"$folder/environment"
save() { if ((SLURM_NODEID == 0)); then echo "$1" >"$OUTPUT_DIR/latest_checkpointed_iteration.txt"; fi; }
train() { for ((i = 0; i < 1000; i++)); do sleep 0.05; done; }
"""


class Cluster(Slurm):
    """A stand-in with a launcher that runs `behaviour`, lines of bash, after it noted its words."""

    def __init__(self, folder: Path, behaviour: str = "", **options: str):
        super().__init__(folder, OUTPUT_DIR=str(folder / "my outputs"), DATA_PATH="data", **options)
        (folder / "my outputs").mkdir()
        python = folder / "my python"
        python.write_text(PYTHON + behaviour)
        python.chmod(0o755)
        self.environment["PYTHON"] = str(python)

    def read_words(self, node: int, attempt: int = 0) -> list[str]:
        return (self.folder / f"node-{node}-attempt-{attempt}" / "words").read_text().split("\0")[:-1]

    def read_environment(self, node: int, attempt: int = 0) -> dict[str, str]:
        text = (self.folder / f"node-{node}-attempt-{attempt}" / "environment").read_text()
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def wait_for(is_true: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert process.poll() is None, f"the script ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_nodes(cluster: Cluster, process: subprocess.Popen[bytes], attempt: int = 0) -> None:
    """Until each launcher of two nodes runs, with its traps set."""
    wait_for(lambda: len(list(cluster.folder.glob(f"node-*-attempt-{attempt}/ready"))) == 2, process)


# A launcher that trains until a signal, then saves and ends as megatron_hammer.training.launch does.
TRAINS = """
trap 'save 7; exit 0' USR1
touch "$folder/ready"
train
"""


def test_directives() -> None:
    directives = read_directives(PRETRAIN.read_text())
    assert directives["signal"] == "B:USR1@600", "to the script alone: srun would answer SIGTERM with SIGKILL"
    assert (directives["nodes"], directives["ntasks-per-node"], directives["gpus-per-node"]) == ("2", "1", "8")
    assert {"requeue", "exclusive"} <= set(directives)
    assert (directives["open-mode"], directives["output"]) == ("append", "%x-%j.out")
    sweep = read_directives(SWEEP.read_text())
    assert (sweep["array"], sweep["output"]) == ("1-4", "%x-%A_%a.out")
    assert read_directives("#!/bin/sh\n#SBATCH --nodes=1\n\ntrue\n#SBATCH --mem=0\n") == {"nodes": "1"}


def test_one_launcher_on_each_node(tmp_path: Path) -> None:
    """Two attempts of srun's odd habits: no CPUs of the job, and no variables after sbatch --export=NONE."""
    cluster = Cluster(
        tmp_path, nodes="r1n[03-04],m7", SLURM_EXPORT_ENV="NONE", SLURM_CPUS_PER_TASK="96",
        NCCL_DEBUG="INFO", NCCL_SOCKET_IFNAME="ib0",
    )  # fmt: skip
    finished = cluster.sbatch(PRETRAIN, "--seed", "7 8")
    assert (finished.code, finished.num_attempts) == (0, 1), finished.output
    for node in range(3):
        words = cluster.read_words(node)
        assert words[:2] == ["-m", "megatron_hammer.training.launch"]
        assert words[2 : words.index("--")] == [
            *("--nproc-per-node", "8"),
            *("--log-dir", f"{tmp_path}/my outputs/logs/job-4500123-0/node-{node}", "--tee", "3"),
            *("--nnodes", "3", "--node-rank", str(node), "--master-addr", "r1n03", "--master-port", "10123"),
            *("--max-restarts", "100"),
        ]
        assert words[-2:] == ["--seed", "7 8"]
        assert words[words.index("--save") + 1] == f"{tmp_path}/my outputs"
        variables = cluster.read_environment(node)
        assert (variables["NCCL_DEBUG"], variables["NCCL_SOCKET_IFNAME"]) == ("INFO", "ib0"), "the user's values win"
    (call,) = cluster.list_calls("srun")
    assert call["cpus_per_task"] == "96"
    assert call["options"] == {"kill-on-bad-exit": "1", "cpu-bind": "none", "export": "ALL", "label": ""}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[03-04,7],m1", "n03"), ("gpu-a[001,005]", "gpu-a001"), ("m1,n[2-3]", "m1"), ("r[1-2]n[07-08]", "r1n07")],
)
def test_the_first_host_is_the_master(tmp_path: Path, nodes: str, first: str) -> None:
    cluster = Cluster(tmp_path, nodes=nodes, SLURM_NNODES="2")
    assert cluster.sbatch(PRETRAIN).code == 0
    assert cluster.read_environment(0)["MASTER_ADDR"] == first


def test_one_node_needs_no_address(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes="n1")
    assert cluster.sbatch(PRETRAIN, CONTAINER_IMAGE="my image.sqsh").code == 0
    assert "--standalone" in cluster.read_words(0)
    options = cluster.list_calls("srun")[0]["options"]
    assert isinstance(options, dict)
    assert options["container-image"] == "my image.sqsh"
    assert options["container-mounts"] == f"{tmp_path}:{tmp_path}"


def test_the_warning_saves_and_requeues_until_the_run_ends(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 'if [[ "${SLURM_RESTART_COUNT:-0}" == 1 ]]; then exit 0; fi' + TRAINS)
    process = cluster.start(PRETRAIN)
    wait_for_nodes(cluster, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert cluster.is_requeued()
    assert [call["words"] for call in cluster.list_calls("scontrol")] == [["requeue", "4500123"]]
    second = cluster.start(PRETRAIN, attempt=1)
    assert second.wait(60) == 0
    assert not cluster.is_requeued()
    output = cluster.output_path.read_text()
    assert "last checkpoint: none" in output, "the file of the first attempt is kept"
    assert "attempt 1 on n[1-2], last checkpoint: 7" in output
    logs = [cluster.read_words(0, attempt)[5] for attempt in (0, 1)]
    assert [Path(log).parent.name for log in logs] == ["job-4500123-0", "job-4500123-1"]


@pytest.mark.parametrize(
    ("behaviour", "is_requeued", "phrase"),
    [
        ("trap 'exit 0' USR1\ntouch \"$folder/ready\"\ntrain", False, "not requeued: this attempt wrote no checkpoint"),
        # Only one node fails: srun ends the other one.
        ('save 7; touch "$folder/ready"; sleep 1; ((SLURM_NODEID == 1)) && exit 134; train', True, "exit code 137"),
        ('touch "$folder/ready"; sleep 1; exit 1', False, "not requeued: this attempt wrote no checkpoint"),
    ],
    ids=["warned-without-checkpoint", "failed-after-checkpoint", "failed-at-once"],
)
def test_only_progress_is_requeued(tmp_path: Path, behaviour: str, is_requeued: bool, phrase: str) -> None:
    cluster = Cluster(tmp_path, behaviour)
    process = cluster.start(PRETRAIN)
    wait_for_nodes(cluster, process)
    if "USR1" in behaviour:
        process.send_signal(signal.SIGUSR1)
    assert (process.wait(60) == 0) == is_requeued
    assert cluster.is_requeued() == is_requeued
    assert phrase in cluster.output_path.read_text()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM]])
def test_cancelling_saves_and_ends(tmp_path: Path, numbers: list[signal.Signals]) -> None:
    """scancel --batch --signal TERM, also after a warning. In a preemption SLURM requeues the job itself."""
    behaviour = TRAINS.replace("'save 7; exit 0'", "'echo signal >>\"$folder/signals\"; sleep 0.5; save 7; exit 0'")
    cluster = Cluster(tmp_path, behaviour)
    process = cluster.start(PRETRAIN)
    wait_for_nodes(cluster, process)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    assert process.wait(60) == 143
    assert (tmp_path / "node-1-attempt-0" / "signals").read_text() == "signal\n", "each node gets one signal"
    assert not cluster.is_requeued()
    assert (tmp_path / "my outputs" / "latest_checkpointed_iteration.txt").read_text() == "7\n"


def test_a_configuration_error_is_final(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "save 7; exit 2", nodes="n1")
    finished = cluster.sbatch(PRETRAIN)
    assert (finished.code, finished.num_attempts) == (2, 1)


def test_requeues_have_a_limit(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 'save "${SLURM_RESTART_COUNT:-0}"; exit 1', nodes="n1")
    finished = cluster.sbatch(PRETRAIN, MAX_REQUEUES="2")
    assert (finished.code, finished.num_attempts) == (2, 3), finished.output
    assert "MAX_REQUEUES: is reached, got 2." in finished.output
    # SLURM's own requeues, after failures of nodes, count as well.
    process = cluster.start(PRETRAIN, attempt=3, MAX_REQUEUES="2")
    assert process.wait(60) == 2
    assert "MAX_REQUEUES: must be at least the number of requeues, got 2 after 3." in cluster.output_path.read_text()


@pytest.mark.parametrize("code", [0, 3])
def test_a_check_can_come_first(tmp_path: Path, code: int) -> None:
    cluster = Cluster(tmp_path, f'if [[ "$2" == torch.distributed.run ]]; then exit {code}; fi', nodes="n1")
    finished = cluster.sbatch(PRETRAIN, "--seed", "7", CHECK_SCRIPT="my check.py")
    calls = cluster.list_calls("srun")
    assert (finished.code, len(calls)) == ((2, 1) if code else (0, 2)), finished.output
    words = calls[0]["words"]
    assert isinstance(words, list)
    assert words[words.index("torch.distributed.run") + 1 :][:3] == ["my check.py", "--preset", "hammer-1b4"]
    assert words[-2:] == ["--seed", "7"]
    assert ("CHECK_SCRIPT: must end with exit code 0, got 3 from my check.py." in finished.output) == bool(code)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_signal_during_the_check_is_no_finding(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The check ends with a failure then. Training has not begun, so the next attempt is not bound to fail."""
    cluster = Cluster(tmp_path, "trap 'exit 1' USR1\ntouch \"$folder/ready\"\ntrain\n")
    process = cluster.start(PRETRAIN, CHECK_SCRIPT="check.py")
    wait_for_nodes(cluster, process)
    process.send_signal(number)
    assert process.wait(60) == code
    assert cluster.is_requeued() == (number == signal.SIGUSR1)
    assert len(cluster.list_calls("srun")) == 1, "no training follows"
    assert "CHECK_SCRIPT" not in cluster.output_path.read_text()


def test_a_requeue_that_slurm_refuses_is_said(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "save 7; exit 1", nodes="n1")
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 3\n")
    finished = cluster.sbatch(PRETRAIN)
    assert (finished.code, finished.num_attempts) == (2, 1)
    assert "scontrol: must be able to requeue job 4500123, got exit code 3." in finished.output


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"NPROC": "a[$(touch ran)]"}, (), "NPROC: must be a whole number above 0, got a[$(touch ran)]."),
        ({"SLURM_RESTART_COUNT": "a[$(touch ran)]"}, (), "SLURM_RESTART_COUNT: must be a whole number, got a["),
        ({"MAX_RESTARTS": "a[$(touch ran)]"}, (), "MAX_RESTARTS: must be a whole number, got a["),
        ({"MAX_REQUEUES": "many"}, (), "MAX_REQUEUES: must be a whole number, got many."),
        ({"DATA_PATH": " \n "}, (), "DATA_PATH: must name a data set, got nothing but spaces."),
        ({"DRY_RUN": "true"}, (), "DRY_RUN: must be 0 or 1, got true."),
        ({}, ("--save", "elsewhere"), "save: must be set by OUTPUT_DIR, got --save."),
        ({}, ("--save=elsewhere",), "save: must be set by OUTPUT_DIR, got --save=elsewhere."),
    ],
)
def test_bad_settings(tmp_path: Path, variables: dict[str, str], flags: tuple[str, ...], message: str) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.start(PRETRAIN, *flags, **variables).wait(60) == 2
    assert f"error: {message}" in cluster.output_path.read_text()
    assert cluster.list_calls("srun") == []
    assert not (tmp_path / "ran").exists()


def test_data_may_be_named_on_several_lines(tmp_path: Path) -> None:
    """As in a YAML block or from a file; every character but white space stays as it is."""
    cluster = Cluster(tmp_path, nodes="n1")
    assert cluster.sbatch(PRETRAIN, DATA_PATH='0.5 /d/$a\n0.5 /d/*"b', TOKENIZER_MODEL="/t/a $b\n'c").code == 0
    words = cluster.read_words(0)
    assert words[words.index("--data-path") + 1 :] == [
        *("0.5", "/d/$a", "0.5", '/d/*"b', "--tokenizer-model", "/t/a $b\n'c")
    ]


def test_outside_slurm_it_says_how(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    process = cluster.start(PRETRAIN, SLURM_JOB_ID="")
    assert process.wait(60) == 2
    assert "SLURM_JOB_ID: must be set by SLURM, got none." in cluster.output_path.read_text()


def test_a_task_of_the_sweep(tmp_path: Path) -> None:
    """Its own flags, folder and job number; DRY_RUN=1 accepts every task."""
    cluster = Cluster(tmp_path, nodes="n1")
    assert cluster.sbatch(SWEEP, "--seed", "1", SLURM_ARRAY_TASK_ID="2").code == 0
    words = cluster.read_words(0)
    assert words[words.index("--save") + 1] == f"{tmp_path}/my outputs/task-2"
    first, last = [place for place, word in enumerate(words) if word == "--lr-warmup-iters"]
    assert first < last < words.index("--seed") == len(words) - 2
    assert words[words.index("--lr") + 1] == "5e-4"
    wrong = cluster.start(SWEEP, SLURM_ARRAY_TASK_ID="5")
    assert wrong.wait(60) == 2
    assert "SLURM_ARRAY_TASK_ID: must be 1 to 4, got 5." in cluster.output_path.read_text()


@pytest.mark.parametrize("task", ["1", "2", "3", "4", "pretrain"])
def test_the_dry_run_accepts_the_examples(tmp_path: Path, task: str) -> None:
    cluster = Cluster(tmp_path, nodes="n[1-2]")
    script = PRETRAIN if task == "pretrain" else SWEEP
    # As on a login node, where there is no job; the launcher's number is that of the stand-in.
    login = {"SLURM_JOB_ID": "", "SLURM_NODEID": "0", "DRY_RUN": "1", "SLURM_ARRAY_TASK_ID": task, "DATA_PATH": ""}
    assert cluster.start(script, **login).wait(60) == 0, cluster.output_path.read_text()
    words = cluster.read_words(0)
    assert words[-3:] == ["--dry-run", "--world-size", "16"]
    assert find(*words[2:], platform="cuda") == []


def test_a_real_run_saves_at_the_warning(tmp_path: Path) -> None:
    """hammer-tiny on two nodes of one process each, over gloo, with the real launcher and the real training."""
    plan = Plan(
        model=PRESETS["hammer-tiny"].model,
        layout=ParallelLayout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, data_parallel_size=2),
        gpu=select_gpu("cpu-core"),
        cluster=select_cluster("cpu-host"),
        seq_length=64, micro_batch_size=1, global_batch_size=2, precision="fp32",
    )  # fmt: skip
    launch = build_launch(
        plan, model_arguments=build_model_arguments(plan.model), name="tiny", train_tokens=None, comment="a test"
    )
    script = tmp_path / "tiny.sbatch"
    script.write_text(render(launch, "slurm"))
    output_dir = tmp_path / "my outputs"
    variables = {
        **{"PYTHON": sys.executable, "HAMMER_ROOT": str(ROOT), "OUTPUT_DIR": str(output_dir), "NPROC": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        "MASTER_PORT": str(20000 + os.getpid() % 10000),
    }
    slurm = Slurm(tmp_path / "slurm", **variables)
    metrics = output_dir / "metrics.jsonl"
    # Loaders of data are in the session of their process, and get its signal too.
    process = slurm.start(script, "--eval-iters", "0", "--num-workers", "2")
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, process, seconds=240)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0, slurm.output_path.read_text()
    assert slurm.is_requeued()
    num_steps = len([line for line in read_lines(metrics) if "loss" in line])
    assert (output_dir / "latest_checkpointed_iteration.txt").read_text() == str(num_steps)
    output = slurm.output_path.read_text()
    assert f"srun ended with exit code 0, last checkpoint: {num_steps}" in output
    logs = sorted((output_dir / "logs" / "job-4500123-0").glob("node-*/*/attempt_0/0/std*.log"))
    assert [log.name for log in logs] == ["stderr.log", "stdout.log"] * 2, "one log per process"
    assert "the same command continues from there" in "".join(log.read_text() for log in logs)
