from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hammer.training.supervision.launcher.supervisor import HangOptions, Supervisor, find_first_failure
from megatron_hammer.training.supervision.progress import ProgressRecord, find_record
from tests.helpers.launched_runs import read_events


@dataclass
class Failure:
    exitcode: int
    timestamp: int = 100
    local_rank: int = 0


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ({0: 1, 1: -9}, 1),  # a killed rank breaks the connections of the others
        ({0: -15, 1: 1}, 1),  # torch ends the others
        ({0: 143, 1: 1}, 1),
        ({0: -9, 1: 2}, 1),  # a mistake of the user is the cause of everything
        ({3: 1, 2: 1}, 3),  # noticed first
    ],
)
def test_the_first_failure_is_the_cause(codes: dict[int, int], first: int) -> None:
    assert find_first_failure({rank: Failure(code) for rank, code in codes.items()})[0] == first


def test_an_earlier_second_counts_before_a_signal() -> None:
    """As where ranks that hang after an error are killed."""
    assert find_first_failure({0: Failure(-9, timestamp=130), 1: Failure(1, timestamp=100)})[0] == 1


HANG_OPTIONS = HangOptions(timeout_s=600, fixed_s=None, ends_hangs=False)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher sets variables for its ranks."""
    for name in ("HAMMER_ATTEMPT", "HAMMER_PROGRESS_DIR", "HAMMER_LOG_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def start(save_dir: Path, max_restarts: int, step: int) -> Supervisor:
    progress_dir = save_dir / "progress"
    progress_dir.mkdir(parents=True)
    supervisor = Supervisor(save_dir, max_restarts, progress_dir, HANG_OPTIONS)
    supervisor.begin_attempt(0, [4, 5], 8, 2, 4)
    record = ProgressRecord(find_record(progress_dir, 1))
    record.enter("saving")
    record.finish_step(step)
    return supervisor


def test_what_was_lost_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    supervisor = start(tmp_path, 1, step=70)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("60")
    assert supervisor.judge({5: Failure(-11, local_rank=1)})
    failed, restart = read_events(tmp_path, "rank-failed", "restart")
    assert failed["message"].startswith(f"rank 5 on {supervisor.host} was killed by SIGSEGV after step 70, saving. It ")
    assert (failed["saved_step"], failed["num_lost_steps"], failed["rank"]) == (60, 10, 5)
    assert restart["message"] == "restart 1 (at most 1), from the checkpoint of step 60; 10 steps run again"
    error, message = capsys.readouterr().err.splitlines()
    assert (error, message) == (f"error: {failed['message']}", restart["message"])


def test_the_last_restart_is_followed_by_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    supervisor = start(tmp_path, 1, step=70)
    assert supervisor.judge({5: Failure(1)})
    assert not supervisor.judge({5: Failure(1)})
    assert "not started again: --max-restarts is 1" in capsys.readouterr().err.splitlines()[-1]
    assert read_events(tmp_path)[-1]["event"] == "run-ended"


@pytest.mark.parametrize(("code", "event"), [(2, "run-ended"), (143, "run-stopped")])
def test_a_mistake_or_a_stop_is_never_tried_again(
    tmp_path: Path, code: int, event: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not start(tmp_path, 5, step=3).judge({4: Failure(code)})
    assert read_events(tmp_path)[-1]["event"] == event
    assert capsys.readouterr().err == "", "the rank has said it"
