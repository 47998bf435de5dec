"""How a launched run ends, with a tiny program instead of training: exit codes and output."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import run

from megatron_hammer.training import launch
from tests.helpers.messages import assert_errors
from tests.helpers.repository import ROOT

DRIVER = "import sys; from megatron_hammer.training import launch; launch.TRAINING_MODULE = 'fake'; launch.main()"
NO_NOISE = ("Traceback", "ChildFailedError", "SignalException", "failed (exitcode")
TIMEOUT_S = 60


def start(
    directory: Path, program: str, *flags: str, num_processes: int = 2, options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    (directory / "fake.py").write_text("import os, signal, sys, time\nfrom pathlib import Path\n" + program)
    environment = {**os.environ, "PYTHONPATH": f"{directory}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "--standalone", "--nproc-per-node", str(num_processes), *options, "--", *flags],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; nothing of torchrun's own report may be in them."""
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert [noise for noise in NO_NOISE if noise in stdout + stderr] == []
    return process.returncode, stdout, stderr


def test_options_without_a_separator_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        launch.main(["--nproc-per-node", "2", "--preset", "hammer-tiny"])
    assert stop.value.code == 2
    assert_errors(
        capsys.readouterr().err,
        ("launch:", "needs -- between torchrun's", "got none", "--nproc-per-node 2 -- --preset"),
    )


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("--nproc-per-node", "2x"), ("nproc-per-node:", "number above 0", "got 2x")),
        (("--nproc-per-node", "0"), ("nproc-per-node:", "got 0")),
        (("--nnodes", "two"), ("nnodes:", "MIN:MAX", "got two")),
        (("--max-restarts", "-1"), ("max-restarts:", "at least 0", "got -1")),
        (("--nnodes", "3:2"), ("nnodes:", "MIN must be at most MAX", "got 3:2")),
        (("--monitor-interval", "0"), ("monitor-interval:", "above 0 seconds", "got 0")),
        (("--monitor-interval", "nan"), ("monitor-interval:", "above 0 seconds", "got nan")),
        (("--master-port", "99999"), ("master-port:", "1 to 65535", "got 99999")),
        (("--master-port", "0", "--nnodes", "2"), ("master-port:", "1 to 65535", "got 0")),
        (("--signals-to-handle", "SIGTERM,FOO,SIGKILL"), ("signals-to-handle:", "can be handled", "got FOO, SIGKILL")),
        (("--shutdown-timeout", "-5"), ("launch:", "options of torchrun", "shutdown_timeout", "-5")),
        (("--redirects", "9"), ("launch:", "options of torchrun", "got: 9 does not match")),
        (("--log-dir", "/proc/none"), ("launch:", "options of torchrun", "/proc/none")),
        (("--rdzv-conf", "oops", "--nnodes", "2"), ("launch:", "options of torchrun", "'oops'")),
        (
            ("--rdzv-conf", "join_timeout=x", "--nnodes", "2", "--node-rank", "1"),
            ("rdzv-conf:", "'join_timeout'", "Correct it"),
        ),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    options: tuple[str, str], facts: tuple[str, ...], capsys, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "lose_what_is_not_taken", lambda stream: stream)  # pytest's has no descriptor
    with pytest.raises(SystemExit) as stop:
        launch.main([*options, "--", "--preset", "hammer-tiny"])
    assert stop.value.code == 2
    assert_errors(capsys.readouterr().err, facts)


@pytest.mark.parametrize(("given", "seconds"), [("2", 120), ("x", 600), ("nan", 600), ("-1", 600), (None, 600)])
def test_a_wrong_timeout_of_collectives_is_left_to_the_ranks(given: str | None, seconds: float) -> None:
    assert (
        launch.read_collective_timeout_s([] if given is None else ["--distributed-timeout-minutes", given]) == seconds
    )


def test_a_pipe_in_the_folder_of_a_run_is_refused(tmp_path: Path, capsys) -> None:
    """Whoever opened it would wait without end."""
    os.mkfifo(tmp_path / "events.jsonl")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(SystemExit) as stop:
        launch.main(["--nproc-per-node", "1", "--", "--save", str(tmp_path)])
    assert stop.value.code == 2
    assert_errors(capsys.readouterr().err, (f"{tmp_path}/events.jsonl:", "must be a file, got a pipe"))


@pytest.mark.parametrize("rank", ["2", "-1"])
def test_a_node_that_the_run_does_not_have_is_refused(rank: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As where somebody counts nodes from 1. torchrun would wait."""
    launch.check_node_rank(run.parse_args(["--nnodes", "2", "--node-rank", "1", "fake.py"]))
    launch.check_node_rank(
        run.parse_args(["--nnodes", "1:3", "--rdzv-endpoint", "host:1", "--node-rank", "9", "fake.py"])
    )
    with pytest.raises(SystemExit) as stop:
        launch.main(["--nnodes", "1:2", f"--node-rank={rank}", "--", "--preset", "hammer-tiny"])
    assert stop.value.code == 2
    assert_errors(capsys.readouterr().err, ("node-rank:", "must be 0 to 1", f"got {rank} of 2 nodes"))


def test_tasks_of_srun_that_would_each_start_a_node_are_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(SystemExit) as stop:
        launch.main(["--nproc-per-node", "8", "--", "--preset", "hammer-tiny"])
    assert stop.value.code == 2
    assert_errors(
        capsys.readouterr().err,
        (
            "launch:",
            "once on each node",
            "got 16 tasks of srun on 2 nodes",
            "python -m megatron_hammer.training.pretrain",
        ),
    )


@pytest.mark.parametrize("options", [("--nnodes", "2", "--node-rank", "0", "--master-addr", "localhost"), ()])
def test_a_port_of_another_run_is_named(options: tuple[str, ...], monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch, "PORT_RELEASE_S", 0.0)
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(SystemExit) as stop:
            launch.main([*options, "--master-port", port, "--nproc-per-node", "1", "--", "--preset", "hammer-tiny"])
    assert stop.value.code == 2
    assert_errors(
        capsys.readouterr().err,
        (
            "master-port:",
            "must be free on node 0",
            f"got {port}: Address already in use",
            "MASTER_PORT for the scripts",
        ),
    )


def test_a_port_that_a_killed_launcher_still_has_is_waited_for() -> None:
    with socket.create_server(("", 0)) as killed:
        options = argparse.Namespace(
            rdzv_backend="static",
            standalone=False,
            rdzv_endpoint="",
            node_rank=0,
            nnodes="2",
            master_port=killed.getsockname()[1],
        )
        threading.Timer(0.3, killed.close).start()
        launch.check_master_port(options)
        assert killed.fileno() == -1, "the check returned before the port was free"


@pytest.mark.distributed
def test_flags_reach_every_process(tmp_path: Path) -> None:
    program = "Path(os.environ['RANK']).write_text(' '.join([os.environ['WORLD_SIZE'], *sys.argv[1:]]))"
    code, _, _ = finish(start(tmp_path, program, "--preset", "x", "--", "--lr=1"))
    assert code == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 --preset x -- --lr=1"] * 2


@pytest.mark.distributed
def test_a_launcher_whose_output_nobody_reads_starts_its_ranks_again(tmp_path: Path) -> None:
    program = "if os.environ['HAMMER_ATTEMPT'] == '0':\n    time.sleep(0.5)\n    sys.exit(3)\nPath('again').touch()"
    process = start(tmp_path, program, options=("--max-restarts", "1"), num_processes=1)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    assert process.wait(TIMEOUT_S) == 0
    assert (tmp_path / "again").exists()


@pytest.mark.distributed
def test_a_configuration_error_ends_with_exit_code_2_and_one_message(tmp_path: Path) -> None:
    program = (
        "from megatron_hammer.errors import ConfigError, exit_on_user_error\n"
        "@exit_on_user_error\n"
        "def main():\n"
        "    raise ConfigError('num-layers: must be even, got 3. Use 4.')\n"
        "main()"
    )
    code, _, stderr = finish(start(tmp_path, program))
    assert code == 2
    assert stderr.splitlines()[-1] == "error: num-layers: must be even, got 3. Use 4."
    assert stderr.count("num-layers") == 1  # both processes found it, one says it


@pytest.mark.distributed
def test_a_killed_process_is_named(tmp_path: Path) -> None:
    program = "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    code, _, stderr = finish(start(tmp_path, program))
    assert code == 128 + signal.SIGKILL
    killed = f"error: rank 1 on {socket.gethostname()} was killed by SIGKILL before its first step. "
    assert stderr.splitlines()[-1].startswith(killed)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        pytest.param([signal.SIGINT, signal.SIGINT], 130, id="impatience"),
        ([signal.SIGHUP], 129),
        pytest.param([signal.SIGUSR1], 0, id="warning"),
        # SLURM's preemption: SIGTERM to the launcher, and SIGUSR1 from the script that got SIGTERM as well.
        pytest.param([signal.SIGTERM, signal.SIGUSR1], 0, id="preemption"),
    ],
)
def test_a_stopped_run_ends_its_processes_cleanly(tmp_path: Path, stops: list[signal.Signals], expected: int) -> None:
    program = (
        "rank = os.environ['RANK']\n"
        "signals = []\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):\n"
        "    signal.signal(number, lambda number, frame: signals.append(number))\n"
        "Path(f'ready-{rank}').touch()\n"
        "while not signals: time.sleep(0.05)\n"
        "time.sleep(1.0)\n"
        "Path(f'saved-{rank}').touch()"
    )
    process = start(tmp_path, program)
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for stop in stops:
        process.send_signal(stop)
        time.sleep(0.3)
    code, _, stderr = finish(process)
    assert code == expected
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert stderr.count(f"kill -9 {process.pid}") == len(stops) - 1  # says how to end at once, in place of doing it


def test_a_hangup_that_nohup_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in launch.list_stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in launch.list_stop_signals()


@pytest.mark.parametrize(
    ("received", "codes"),
    [
        ([[], [signal.SIGHUP]], [129, 129]),
        ([[], []], [0, 0]),
        ([[signal.SIGTERM], [signal.SIGUSR1]], [0, 0]),  # a scheduler's warning: no rank may end the job
    ],
)
def test_ranks_that_a_signal_to_one_of_them_stops_end_alike(
    received: list[list[signal.Signals]], codes: list[int]
) -> None:
    def choose(own: list[signal.Signals]) -> int:
        def max_over_ranks(value: float) -> float:
            asked.append(value)
            is_first = len(asked) % 2
            return max(
                float(signal.SIGUSR1 in signals) if is_first else float(launch.choose_exit_code(signals))
                for signals in received
            )

        asked: list[float] = []
        return launch.choose_common_exit_code(own, max_over_ranks)

    assert [choose(own) for own in received] == codes
