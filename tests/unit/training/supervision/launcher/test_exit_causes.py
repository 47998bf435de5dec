import signal
from pathlib import Path

import pytest

from megatron_hammer.training.supervision.launcher.exit_causes import Evidence, ShrunkFile, describe_exit, explain_exit

LOG = Path("save/logs/rank-3.log")


@pytest.mark.parametrize(
    ("code", "text"),
    [(1, "ended with exit code 1"), (-9, "was killed by SIGKILL"), (-99, "was killed by signal 99")],
)
def test_an_exit_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


SHORT = ShrunkFile(path=Path("data.bin"), before_bytes=5000, now_bytes=40)
RESET = "RuntimeError: [gloo/pair.cc:545] Read error [::1]:62666: Connection reset by peer"


@pytest.mark.parametrize(
    ("code", "evidence", "facts"),
    [
        (-signal.SIGKILL, {}, ("no process killed for want of memory", "scheduler")),
        (-signal.SIGKILL, {"is_out_of_memory": True}, ("the host had no memory left", "--num-workers")),
        (-signal.SIGKILL, {"is_out_of_memory": True, "memory_limit_bytes": 3 << 29}, ("limited to 1.5 GiB",)),
        (-signal.SIGBUS, {"shrunk_files": (SHORT,)}, ("data.bin has 40 bytes and had 5,000", "Restore the file")),
        (-signal.SIGBUS, {"shm_free_bytes": 100}, ("/dev/shm is full", "--shm-size")),
        (-signal.SIGBUS, {"shm_free_bytes": 1 << 30}, ("had mapped", "--verify")),
        (-signal.SIGSEGV, {}, ("crashed in compiled code", str(LOG))),
        (-signal.SIGTERM, {}, ("Somebody else ended it",)),
        (1, {"note": "KeyError: 'x'"}, ("KeyError: 'x'", f"stack is in {LOG}")),
        (1, {"note": "num-workers: must live. Start again."}, (f"Start again. Its stack is in {LOG}.",)),
        (1, {"note": RESET}, ("lost the connection to another rank", "reported first", "Connection reset by peer")),
        (1, {"note": "OutOfMemoryError: CUDA out of memory."}, ("GPU had no memory left", "--micro-batch-size")),
        (1, {}, (f"last lines in {LOG}",)),
        (2, {"note": "lr: must be positive, got -1. Correct it."}, ("lr: must be positive, got -1. Correct it.",)),
    ],
)
def test_a_cause_has_a_remedy(code: int, evidence: dict, facts: tuple[str, ...]) -> None:
    text = explain_exit(code, Evidence(log_path=LOG, **evidence))
    assert [fact for fact in facts if fact not in text] == []
