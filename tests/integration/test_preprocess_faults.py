"""The preprocessor after kills and on a full disk: it never hangs and, continued, writes the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.messages import assert_errors, assert_problem
from tests.helpers.tool_runs import run_tool, start_tool, without_notes
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer

pytestmark = pytest.mark.integration

TOOL = "tools/preprocess_data.py"
WAIT_S = 60
NUM_KILLS = 8
# The package function as a user's script would call it; small blocks, and by default a journal after every one of them.
SCRIPT = """
import sys
from pathlib import Path
from megatron_hammer.data.indexed.manifest import JobShard
from megatron_hammer.data.preprocess.preprocess import preprocess
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.errors import exit_on_user_error

@exit_on_user_error
def main():
    preprocess(PreprocessOptions(
        inputs=("in",), tokenizer_path=Path("toy.model"), json_keys=("text", "title"), append_eod=True, max_errors=9,
        **(dict(journal_interval_s=0.0, block_bytes=16384) | eval(sys.argv[1])),
    ))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def start(script: str, *arguments: str | Path, cwd: Path, max_file_bytes: int | None = None) -> subprocess.Popen[str]:
    """A script that the test wrote into cwd."""
    return start_tool(cwd / script, *arguments, cwd=cwd, max_file_bytes=max_file_bytes)


def run(*arguments: str | Path, cwd: Path, max_file_bytes: int | None = None) -> tuple[int, str, str]:
    code, stdout, stderr = run_tool(TOOL, *arguments, cwd=cwd, max_file_bytes=max_file_bytes)
    return code, stdout, without_notes(stderr)


def kill_group(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=WAIT_S)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.01)


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- killed at any moment --------------------------------------------------------------------------------------------


def write_inputs(folder: Path, tokenizer_path: Path) -> None:
    """Several formats, some bad lines, more than one key."""
    (folder / "in").mkdir()
    (folder / "run.py").write_text(SCRIPT)
    (folder / "toy.model").write_bytes(tokenizer_path.read_bytes())
    rows = [{"text": TOY_TEXTS[n % 3] * (n % 7), "title": f"title {n}" if n % 5 else ""} for n in range(2500)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    lines[100] = "\n"
    lines[1900] = "broken\n"
    (folder / "in" / "a.jsonl").write_text("".join(lines))
    (folder / "in" / "b.json").write_text(json.dumps(rows[:400]))
    import pyarrow
    import pyarrow.parquet
    import zstandard

    (folder / "in" / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[200:700]).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:600]), folder / "in" / "d.parquet", row_group_size=97)


def start_run(folder: Path, output: str, **options: object) -> subprocess.Popen[str]:
    settings = repr(options).replace("'", '"')
    return start("run.py", f'dict(output_prefix=Path("{output}"), **{settings})', cwd=folder)


def run_once(folder: Path, output: str, **options: object) -> float:
    """Run to the end and return its seconds."""
    started_at_s = time.monotonic()
    process = start_run(folder, output, **options)
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, stderr
    return time.monotonic() - started_at_s


def run_and_kill(folder: Path, output: str, delay_s: float, **options: object) -> bool:
    """Start a run, kill its whole group some time later, and say whether it was complete by then."""
    process = start_run(folder, output, **options)
    try:
        time.sleep(delay_s)
        return process.poll() == 0
    finally:
        kill_group(process)


@pytest.mark.parametrize(
    "num_kills, options",
    [(NUM_KILLS, {"seed": 7, "num_workers": 2}), (NUM_KILLS // 2, {"num_workers": 1})],
    ids=["shuffled", "in order"],
)
def test_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer_path: Path, num_kills: int, options: dict[str, int]
) -> None:
    write_inputs(tmp_path, tokenizer_path)
    duration_s = run_once(tmp_path, "whole/c", **options)
    whole = read_all(tmp_path / "whole")
    assert sorted(name.rpartition(".")[2] for name in whole) == ["bin", "bin", "idx", "idx", "json", "json"]
    draw = random.Random(5)
    num_killed = num_continued = 0
    journal_path = tmp_path / "killed" / "c.journal.json"
    while num_killed < num_kills or num_continued < num_kills // 4:
        assert num_killed < 4 * num_kills, "hardly any run came as far as its journal"
        num_continued += journal_path.exists()
        if not run_and_kill(tmp_path, "killed/c", draw.uniform(0.4, 1) * duration_s, **options):
            num_killed += 1
            duration_s *= 1 if journal_path.exists() else 1.1  # the machine has become slower
            continue
        duration_s *= 0.9
        assert read_all(tmp_path / "killed") == whole
        for path in (tmp_path / "killed").iterdir():
            path.unlink()
    run_once(tmp_path, "killed/c", **options)
    assert read_all(tmp_path / "killed") == whole


# Which call of what ends the process, and whether before or after it; two keys, so two pairs and two to be shuffled.
RUN = "megatron_hammer.data.preprocess.run"
WRITER = "megatron_hammer.data.indexed.pair_writer.IndexedWriter"
MOMENTS = [
    *((f"{WRITER}.finish", number, "before") for number in (1, 2)),
    *((f"{RUN}.shuffle_pairs", 1, when) for when in ("before", "after")),
    *((f"{WRITER}.finish", number, "after") for number in (3, 4)),
    *((f"{RUN}.encode_manifest", number, "before") for number in (1, 2)),
    *((f"{WRITER}.publish", number, when) for number in (1, 2) for when in ("before", "after")),
    (f"{RUN}.select_spool_prefix", 1, "before"),  # amid remove_leftovers: the journal is gone, spools are not
    ("megatron_hammer.data.preprocess.preprocess.remove_leftovers", 1, "after"),
]
# Ends the process, as SIGKILL does, before or after the given call of a function.
KILLER = """
import os, sys, pkgutil
name, number, when = sys.argv[2], int(sys.argv[3]), sys.argv[4]
owner, _, attribute = name.rpartition(".")
owner = pkgutil.resolve_name(owner)
original = getattr(owner, attribute)
calls = 0
def killing(*arguments, **options):
    global calls
    calls += 1
    if calls == number and when == "before":
        os._exit(9)
    result = original(*arguments, **options)
    if calls == number:
        os._exit(9)
    return result
setattr(owner, attribute, killing)
"""


def test_killed_around_every_step_of_the_end(tmp_path: Path, tokenizer_path: Path) -> None:
    """Random kills seldom hit the short phases, so each of their steps is hit on purpose, one after another."""
    write_inputs(tmp_path, tokenizer_path)
    (tmp_path / "in" / "a.jsonl").unlink()
    run_once(tmp_path, "whole/c", seed=7)
    whole = read_all(tmp_path / "whole")
    (tmp_path / "kill.py").write_text(SCRIPT.replace('if __name__ == "__main__":', KILLER + "\nif True:"))
    for function, number, when in MOMENTS:
        settings = 'dict(output_prefix=Path("killed/c"), seed=7)'
        process = start("kill.py", settings, function, str(number), when, cwd=tmp_path)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 9, (function, number, when)
    run_once(tmp_path, "killed/c", seed=7)
    assert read_all(tmp_path / "killed") == whole


# --- stopped by signals, dead workers, a full disk -------------------------------------------------------------------


@pytest.fixture
def long_arguments(tmp_path: Path, tokenizer_path: Path) -> tuple[str | Path, ...]:
    """A command that takes several seconds, with two workers."""
    line = json.dumps({"text": "the quick brown fox jumps " * 40}) + "\n"
    (tmp_path / "c.jsonl").write_text(line * 60_000)
    return ("--input", "c.jsonl", "--tokenizer-model", tokenizer_path, "--output-prefix", "out/c", "--workers", "2")


@pytest.fixture
def running_tool(tmp_path: Path, long_arguments: tuple[str | Path, ...]) -> Iterator[subprocess.Popen[str]]:
    """A run with two busy workers, early in its input and before its first journal."""
    process = start_tool(TOOL, *long_arguments, cwd=tmp_path)
    partial_path = tmp_path / "out" / "c_text_document.bin.partial"
    wait_until(lambda: partial_path.exists() and partial_path.stat().st_size > 0)
    yield process
    kill_group(process)


@pytest.fixture
def journaled_run(tmp_path: Path, tokenizer_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run with two workers that has a journal."""
    write_inputs(tmp_path, tokenizer_path)
    lines = (tmp_path / "in" / "a.jsonl").read_text()
    (tmp_path / "in" / "0.jsonl").write_text((lines.replace("\n\n", "\n").replace("broken\n", "")) * 40)
    process = start_run(tmp_path, "out/c", num_workers=2, journal_interval_s=0.1)
    wait_until((tmp_path / "out" / "c.journal.json").exists)
    yield process
    kill_group(process)


def find_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The encoding processes, without multiprocessing's resource tracker, which outlives them by a moment."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_journal_leaves_nothing(
    tmp_path: Path, running_tool: subprocess.Popen[str], number: signal.Signals, code: int
) -> None:
    workers = find_workers(running_tool)
    os.killpg(running_tool.pid, number)
    _, stderr = running_tool.communicate(timeout=WAIT_S)
    assert running_tool.returncode == code
    assert_errors(without_notes(stderr), ("interrupted", "nothing was done yet"))
    assert not list((tmp_path / "out").iterdir())
    assert not psutil.wait_procs(workers, timeout=WAIT_S)[1]


# The tool itself, with a journal after every small block.
HASTY_TOOL = """
import dataclasses
from megatron_hammer.cli import preprocess_data

if __name__ == "__main__":
    build = preprocess_data.build_options
    preprocess_data.build_options = lambda arguments: dataclasses.replace(
        build(arguments), journal_interval_s=0.0, block_bytes=16384
    )
    preprocess_data.main()
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_costs_only_the_blocks_after_the_last_journal(
    tmp_path: Path, long_arguments: tuple[str | Path, ...], number: signal.Signals, code: int
) -> None:
    (tmp_path / "hasty.py").write_text(HASTY_TOOL)
    process = start("hasty.py", *long_arguments, cwd=tmp_path)
    wait_until((tmp_path / "out" / "c.journal.json").exists)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == code
    assert_errors(without_notes(stderr), ("interrupted", "out/c.journal.json: ", "is kept", "same command"))
    code, stdout, _ = run(*long_arguments, cwd=tmp_path)
    assert code == 0
    assert re.fullmatch(
        r"out/c_text_document: 60,000 documents in, 60,000 out, 0 dropped, 0 empty; [\d,]+ tokens as uint16, "
        r"[\d.]+ bytes per token; [\d.]+ s since it was continued\n",
        stdout,
    )
    code, stdout, _ = run(*long_arguments, cwd=tmp_path)
    assert code == 0
    assert stdout.endswith("; already complete, nothing was written\n")


def test_workers_end_with_a_killed_parent_and_leftovers_are_not_reused(
    tmp_path: Path, running_tool: subprocess.Popen[str], long_arguments: tuple[str | Path, ...]
) -> None:
    workers = find_workers(running_tool)
    assert len(workers) == 2
    running_tool.kill()
    assert not psutil.wait_procs(workers, timeout=WAIT_S)[1]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [
        "c.lock",
        *(f"c_text_document.{part}.partial" for part in ("bin", "documents", "lengths")),
    ]
    (tmp_path / "c.jsonl").write_text('{"text": "the fox"}\n')
    assert run(*long_arguments, cwd=tmp_path)[0] == 0
    assert (tmp_path / "out" / "c_text_document.bin").stat().st_size < 40
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"c_text_document.{part}" for part in ("bin", "idx", "manifest.json")
    ]


def test_a_killed_worker_ends_the_run(tmp_path: Path, running_tool: subprocess.Popen[str]) -> None:
    find_workers(running_tool)[0].kill()
    _, stderr = running_tool.communicate(timeout=WAIT_S)
    assert running_tool.returncode == 2
    assert re.fullmatch(
        r"error: workers: every worker must live to the end, got one that died near c.jsonl:\d+. It was killed, "
        r"most often for want of memory; pass fewer --workers or use a machine with more memory.\n",
        without_notes(stderr),
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_worker_costs_only_the_blocks_after_the_last_journal(
    tmp_path: Path, journaled_run: subprocess.Popen[str]
) -> None:
    find_workers(journaled_run)[-1].kill()
    _, stderr = journaled_run.communicate(timeout=WAIT_S)
    assert journaled_run.returncode == 2
    assert_problem(stderr.splitlines()[-1], "error: out/c.journal.json:", "is kept", "same command")
    assert not any(path.suffix in (".bin", ".idx") for path in (tmp_path / "out").iterdir())
    run_once(tmp_path, "out/c", journal_interval_s=9.0)
    run_once(tmp_path, "whole/c", journal_interval_s=9.0)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path, journaled_run: subprocess.Popen[str]) -> None:
    second = start_run(tmp_path, "out/c")
    _, stderr = second.communicate(timeout=WAIT_S)
    assert second.returncode == 2
    assert re.fullmatch(
        rf"error: out/c.lock: another run is writing this output, got process {journaled_run.pid} on \S+. "
        r"Wait for it to end, or pass another --output-prefix.\n",
        stderr,
    )


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, long_arguments: tuple[str | Path, ...]) -> None:
    code, stdout, stderr = run(*long_arguments, cwd=tmp_path, max_file_bytes=2_000_000)
    assert (code, stdout) == (2, "")
    assert_errors(stderr, ("out/c_text_document.bin.partial:", "cannot be written (File too large)"))
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_costs_only_the_blocks_after_the_last_journal(tmp_path: Path, tokenizer_path: Path) -> None:
    write_inputs(tmp_path, tokenizer_path)
    process = start("run.py", 'dict(output_prefix=Path("out/c"))', cwd=tmp_path, max_file_bytes=100_000)
    _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert_errors(
        without_notes(stderr),
        ("out/c_text_document.bin.partial:", "cannot be written (File too large)"),
        ("out/c.journal.json:", "is kept", "same command"),
    )
    assert not any(path.suffix in (".bin", ".idx") for path in (tmp_path / "out").iterdir())
    run_once(tmp_path, "out/c", journal_interval_s=9.0)
    run_once(tmp_path, "whole/c", journal_interval_s=9.0)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")
