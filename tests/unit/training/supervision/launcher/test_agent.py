import json
from pathlib import Path

from megatron_hammer.training.supervision.launcher.agent import build_restart

PYTHON = ("-u", "-m", "megatron_hammer.training.pretrain")


def test_ranks_of_a_repeated_run_resume_from_its_own_checkpoints(tmp_path: Path) -> None:
    """And do not begin again with the checkpoint with which the repeated run began."""
    recorded = ["--lr", "1", "--pretrained-checkpoint", "base", "--finetune", "--save", "old"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "start-1.json").write_text(json.dumps({"arguments": recorded, "directory": "/"}))
    restart = build_restart([*PYTHON, "--lr", "2", "--from-run", str(tmp_path), "--save", "new"], Path("new"))
    assert restart == (*PYTHON, "--lr", "1", "--lr", "2", "--save", "new", "--load", "new")
    assert build_restart([*PYTHON, "--save", "new"], Path("new")) == (*PYTHON, "--save", "new")
