"""The process around llama.cpp ends with its parent, also when llama.cpp does not; a stand-in takes its place here."""

import os
import signal
import subprocess
from pathlib import Path

from megatron_hammer.checkpoint.gguf.llama_cpp import COMMAND

STUCK = """
import time

class CommonParams: pass

class Server:
    def __init__(self, parameters): pass
    def __del__(self): time.sleep(60)

def get_device_info(): return []
"""


def test_a_server_that_never_ends_is_ended_when_its_parent_has_gone(tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.py").write_text(STUCK)
    process = subprocess.Popen(
        COMMAND, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"{}\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    process.stdin.close()
    assert process.wait(timeout=50) == -signal.SIGALRM
