import json
import os
import socket
import struct
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.training.supervision import heartbeat
from megatron_hammer.training.supervision.heartbeat import Heartbeat, render_prometheus

STEP = {"step": 7, "train_steps": 9, "loss": 2.5, "tokens_per_s": 1000.0, "step_time_s": 0.5}


@pytest.fixture(autouse=True)
def no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_INTERVAL_S", 0.0)


def test_a_heartbeat_says_where_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAMMER_ATTEMPT", "3")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("5")
    os.utime(tracker, (tracker.stat().st_mtime - 100,) * 2)
    Heartbeat("run", tmp_path, None, None).beat(**STEP)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert STEP.items() <= beat.items()
    assert (beat["restarts"], beat["checkpoint_step"], beat["process"]) == (3, 5, os.getpid())
    assert 100 <= beat["checkpoint_age_s"] < 160
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_loss_that_is_no_number_is_valid_json_and_valid_prometheus(tmp_path: Path) -> None:
    Heartbeat("run", tmp_path, tmp_path / "run.prom", None).beat(**STEP | {"loss": float("nan")})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "heartbeat.json").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] is None
    assert 'hammer_loss{run="run"} NaN\n' in (tmp_path / "run.prom").read_text()


def test_it_is_written_at_most_once_per_interval_and_at_the_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "_INTERVAL_S", 3600.0)
    beating = Heartbeat("run", tmp_path, None, None)

    def read_step() -> int:
        return json.loads((tmp_path / "heartbeat.json").read_text())["step"]

    beating._written_at_s = -1e9
    for step, written in ((1, 1), (2, 1), (9, 9)):
        beating.beat(**STEP | {"step": step})
        assert read_step() == written


def test_the_text_is_prometheus_exposition_format() -> None:
    described = {**STEP, "checkpoint_step": 0, "checkpoint_age_s": None, "restarts": 2, "written_at_s": 1e9}
    lines = render_prometheus(described, 'a "run" \\ b').splitlines()
    assert "# TYPE hammer_restarts_total counter" in lines
    assert 'hammer_step{run="a \\"run\\" \\\\ b"} 7' in lines
    assert not any(line.startswith("hammer_checkpoint_age_seconds") for line in lines), "there is no checkpoint"
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert names == [line.split("{")[0] for line in lines if not line.startswith("#")]


def leave_without_reading(port: int) -> None:
    with socket.create_connection(("localhost", port)) as client:
        client.sendall(b"no request\r\n\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end


def test_the_port_serves_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(heartbeat, "_CLIENT_TIMEOUT_S", 0.2)
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    beating = Heartbeat("run", None, None, port)
    try:
        url = f"http://localhost:{port}"
        assert urllib.request.urlopen(f"{url}/metrics", timeout=60).read() == b"", "no step yet"
        beating.beat(**STEP)
        answer = urllib.request.urlopen(f"{url}/metrics", timeout=60)
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert 'hammer_step{run="run"} 7\n' in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/etc/passwd", timeout=60)
        with socket.create_connection(("localhost", port)) as silent:  # others are served soon
            leave_without_reading(port)
            assert urllib.request.urlopen(f"{url}/metrics", timeout=60).status == 200
            silent.settimeout(60)
            assert silent.recv(1) == b""
        assert "Traceback" not in capsys.readouterr().err
        with pytest.raises(ConfigError, match=rf"prometheus-port: must be free .* got {port}"):
            Heartbeat("run", None, None, port)
    finally:
        beating.server.shutdown()
        beating.server.server_close()


def test_a_place_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Heartbeat("run", tmp_path / "file", tmp_path / "file" / "run.prom", None).beat(**STEP)
