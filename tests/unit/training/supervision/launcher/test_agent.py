import json
import signal
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException

from megatron_hammer.training.supervision.launcher.agent import FAILURE_GRACE_S, SupervisedAgent, build_restart

PYTHON = ("-u", "-m", "megatron_hammer.training.pretrain")


def test_ranks_of_a_repeated_run_resume_from_its_own_checkpoints(tmp_path: Path) -> None:
    """And do not begin again with the checkpoint with which the repeated run began."""
    recorded = ["--lr", "1", "--pretrained-checkpoint", "base", "--finetune", "--save", "old"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "start-1.json").write_text(json.dumps({"arguments": recorded, "directory": "/"}))
    restart = build_restart([*PYTHON, "--lr", "2", "--from-run", str(tmp_path), "--save", "new"], Path("new"))
    assert restart == (*PYTHON, "--lr", "1", "--lr", "2", "--save", "new", "--load", "new")
    assert build_restart([*PYTHON, "--save", "new"], Path("new")) == (*PYTHON, "--save", "new")


@pytest.mark.parametrize(
    ("error", "ended_by"),
    [
        (SignalException("", signal.SIGHUP), (signal.SIGHUP, 99)),
        (TimeoutError(), (signal.SIGKILL, FAILURE_GRACE_S)),
    ],
)
def test_ranks_are_asked_to_save_only_where_a_signal_stops_the_run(
    error: Exception, ended_by: tuple[signal.Signals, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a node that has lost node 0's launcher would stop those of node 0, too, with exit code 0."""
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", lambda *arguments: None)
    agent, ranks = object.__new__(SupervisedAgent), mock.Mock()
    agent._pcontext, agent._stop_grace_s = ranks, 99.0
    try:
        raise error
    except Exception:
        agent._shutdown(signal.SIGHUP)
    ranks.close.assert_called_once_with(ended_by[0], timeout=ended_by[1])
