"""SLURM for tests: sbatch, srun and scontrol as stand-ins that run a job's script on "nodes" of this machine.

They do what the manual pages of SLURM 26.05 and its sources say, as far as scripts depend on it: sbatch reads the
directives before the first command; srun starts one task per node, takes CPUs from SRUN_CPUS_PER_TASK alone, passes the
environment on only as --export says, hands SIGUSR1 to its tasks, answers SIGTERM with SIGKILL, and with
--kill-on-bad-exit ends all tasks after one that fails; scontrol requeue starts the script again, with a higher
SLURM_RESTART_COUNT. Every call is noted in a file of the job.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120
UNSET = ("SLURM", "SRUN", "MASTER_", "NODE_RANK", "NNODES", "NPROC", "DATA_PATH", "OUTPUT_DIR", "RANK", "WORLD_SIZE")


def read_directives(script: str) -> dict[str, str]:
    """Options of the #SBATCH lines before the first line that is neither empty nor a comment."""
    options = {}
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = value
    return options


def expand_nodes(text: str) -> list[str]:
    """`n[03-04,7],m1` as n03, n04, n7, m1."""
    names = []
    for prefix, ranges, name in re.findall(r"([^,\[]+)\[([^\]]+)\]|([^,\[]+)", text):
        if name:
            names.append(name)
        for part in ranges.split(",") if ranges else ():
            first, _, last = part.partition("-")
            names += [f"{prefix}{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)]
    return names


@dataclass(frozen=True)
class Finished:
    code: int
    output: str  # of all attempts, as in the job's file
    num_attempts: int


class Slurm:
    """A cluster in a folder, with the stand-ins in its `bin`. nodes: the job's, as SLURM writes them."""

    def __init__(self, folder: Path, *, nodes: str = "n[1-2]", **environment: str):
        self.folder, self.nodes = folder, nodes
        self.calls_path, self.output_path = folder / "calls.jsonl", folder / "job.out"
        (folder / "bin").mkdir(parents=True)
        for name in ("srun", "scontrol"):
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(__file__)} {name} "$@"\n')
            path.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(UNSET)}
        self.environment |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_STAND_IN": str(folder),
            "SLURM_JOB_ID": "4500123",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_NNODES": str(len(expand_nodes(nodes))),
            **environment,
        }

    def sbatch(self, script: Path, *flags: str, **variables: str) -> Finished:
        """Run a job to its end, through all its requeues."""
        for attempt in range(10):
            process = self.start(script, *flags, attempt=attempt, **variables)
            code = process.wait(TIMEOUT_S)
            if not self.is_requeued():
                return Finished(code, self.output_path.read_text(), attempt + 1)
        raise AssertionError(f"requeued without an end: {self.output_path.read_text()}")

    def start(self, script: Path, *flags: str, attempt: int = 0, **variables: str) -> subprocess.Popen[bytes]:
        """One attempt of the batch script; its SIGUSR1 is what --signal=B: sends."""
        directives = read_directives(script.read_text())
        environment = self.environment | variables
        if attempt:
            environment["SLURM_RESTART_COUNT"] = str(attempt)
        with self.output_path.open("ab" if directives.get("open-mode") == "append" else "wb") as output:
            return subprocess.Popen(
                ["bash", str(script), *flags], env=environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def is_requeued(self) -> bool:
        mark = self.folder / "requeued"
        was = mark.exists()
        mark.unlink(missing_ok=True)
        return was

    def list_calls(self, name: str) -> list[dict[str, object]]:
        """The calls of a stand-in, and of `task`: each with its words and the variables of interest."""
        lines = self.calls_path.read_text().splitlines() if self.calls_path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]


# --- the stand-ins: this file as a program ---------------------------------------------------------------------------


def note(name: str, words: list[str], **more: object) -> None:
    with Path(os.environ["SLURM_STAND_IN"], "calls.jsonl").open("a") as calls:
        calls.write(json.dumps({"name": name, "words": words, **more}) + "\n")


def scontrol(words: list[str]) -> int:
    note("scontrol", words)
    if words != ["requeue", os.environ["SLURM_JOB_ID"]]:
        return 1
    Path(os.environ["SLURM_STAND_IN"], "requeued").touch()
    return 0


def iterate_task_environments(options: dict[str, str]) -> Iterator[dict[str, str]]:
    nodes = os.environ["SLURM_JOB_NODELIST"]
    exported = options.get("export", os.environ.get("SLURM_EXPORT_ENV", "ALL"))
    kept = dict(os.environ)
    if exported == "NONE":
        kept = {name: value for name, value in kept.items() if name.startswith("SLURM_") or name == "PATH"}
    num_nodes = len(expand_nodes(nodes))
    for number in range(num_nodes):
        yield kept | {
            "SLURM_NODEID": str(number),
            "SLURM_PROCID": str(number),
            "SLURM_STEP_NUM_NODES": str(num_nodes),
            "SLURM_STEP_NUM_TASKS": str(num_nodes),
            "SLURM_STEP_NODELIST": nodes,
        }


def srun(words: list[str]) -> int:
    """One task per node; the first bad exit code, as srun returns the highest one."""
    split = next(number for number, word in enumerate(words) if not word.startswith("--"))
    options = {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words[:split])}
    cpus = options.get("cpus-per-task", os.environ.get("SRUN_CPUS_PER_TASK"))
    note("srun", words, options=options, cpus_per_task=cpus)
    tasks: list[subprocess.Popen[bytes]] = []

    def send(number: int) -> None:
        for task in tasks:
            if task.poll() is None:
                task.send_signal(number)

    signal.signal(signal.SIGUSR1, lambda *_: send(signal.SIGUSR1))
    signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
    tasks += [
        subprocess.Popen(words[split:], env=environment, start_new_session=True)
        for environment in iterate_task_environments(options)
    ]
    while None in [task.poll() for task in tasks]:
        if any(task.returncode for task in tasks) and options.get("kill-on-bad-exit") == "1":
            send(signal.SIGKILL)
        time.sleep(0.02)
    # A task that a signal ended counts as 128 and the signal.
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
