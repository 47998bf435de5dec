import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.config import saved_run
from megatron_hammer.config.preflight.checkpoint import find_unwritable
from tests.helpers.messages import assert_problem
from tests.helpers.parsed_flags import TINY, find, parse

MOE = ("--preset", "hammer-tiny-moe", "--mock-data", "--global-batch-size", "8")


def write_checkpoint(folder: Path, *, step: int = 7) -> Path:
    """Only what preflight looks at before it opens the checkpoint itself."""
    checkpoint_dir = folder / f"iter_{step:07d}"
    checkpoint_dir.mkdir(parents=True)
    (folder / LATEST_FILE).write_text(str(step))
    (checkpoint_dir / ".metadata").write_bytes(b"")
    return checkpoint_dir


def save_with(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], **arguments: object) -> None:
    """Make every checkpoint one that was saved with these flags, and arguments that stand for others."""
    saved = argparse.Namespace(**(vars(parse(*flags).namespace) | arguments))
    monkeypatch.setattr(saved_run, "open_checkpoint", lambda path: SimpleNamespace(args=saved, iteration=7))
    monkeypatch.setattr(saved_run, "find_visible_damage", lambda directory, has_hash_check: [])


def test_a_run_that_continues_itself_may_be_new(tmp_path: Path) -> None:
    assert find(*TINY, "--save", str(tmp_path / "new")) == []  # --load is --save by default
    assert find(*TINY, "--save", str(tmp_path / "new"), "--load", f"{tmp_path}/./new") == []
    assert list(tmp_path.iterdir()) == []


def test_another_folder_must_hold_a_checkpoint(tmp_path: Path) -> None:
    (problem,) = find(*TINY, "--save", str(tmp_path / "new"), "--load", str(tmp_path))
    assert f"load: must be a checkpoint ({LATEST_FILE}), got load={tmp_path}." in problem
    (problem,) = find(*TINY, "--load", str(tmp_path / "gone"))
    assert "load: must be an existing folder" in problem
    (problem,) = find(*TINY, "--pretrained-checkpoint", str(tmp_path))
    assert "pretrained-checkpoint: must be a checkpoint" in problem


def test_the_tracker_must_name_an_existing_iteration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / LATEST_FILE).write_text("8")
    missing, damaged, problem = find(*TINY, "--load", str(tmp_path))
    assert f"checkpoint iter_0000008 named by {LATEST_FILE} is missing" in missing
    assert damaged.startswith("load: iter_0000007 is passed over: ")
    assert_problem(problem, f"load: {tmp_path}:", "must hold an intact iteration", "none of 2", "start anew")
    (tmp_path / LATEST_FILE).write_text("eight")
    problems = find(*TINY, "--load", str(tmp_path))
    assert "must hold a step number or 'release', got 'eight'" in problems[0]
    (problem,) = find(*TINY, "--load", str(tmp_path), "--ckpt-step", "3")
    assert "load: checkpoint iter_0000003 named by --ckpt-step is missing" in problem


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "iter_0000007" / "metadata.json").write_text("{}")
    problems = find(*TINY, "--load", str(tmp_path))
    assert len(problems) == 2
    assert problems[0].startswith("load: iter_0000007 is passed over: ")
    assert "metadata.json: must name the sharded_backend" in problems[0]
    (problem,) = find(*TINY, "--load", str(tmp_path), "--ckpt-step", "7")
    assert "metadata.json: must name the sharded_backend" in problem
    (problem,) = find(*TINY, "--pretrained-checkpoint", str(tmp_path))
    assert problem.startswith("pretrained-checkpoint: ")
    assert "metadata.json: must name the sharded_backend" in problem


def test_a_lost_tracker_does_not_start_a_run_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (write_checkpoint(tmp_path) / "metadata.json").write_text("{}")
    (tmp_path / LATEST_FILE).unlink()
    flags = (*TINY, "--save", str(tmp_path))
    assert "must hold an intact iteration" in find(*flags)[-1]
    save_with(monkeypatch, TINY)
    saved_run._choose.cache_clear()
    assert find(*flags) == []
    settings = parse(*flags).settings
    choice = saved_run.choose_checkpoint(settings.checkpoints)
    assert (choice.iteration, choice.directory) == (7, tmp_path / "iter_0000007")
    assert f"{tmp_path / LATEST_FILE}: must exist beside 1 iterations" in choice.notes[0]
    assert "checkpoint iter_0000007 in" in saved_run.describe_weights(settings.checkpoints, None)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    save_with(monkeypatch, TINY)
    assert find(*TINY, "--load", str(tmp_path)) == []
    problems = find(*TINY, "--load", str(tmp_path), "--num-layers", "6", "--add-qkv-bias", "--vocab-size", "5000")
    assert [problem.split(":")[0] for problem in problems] == ["num-layers", "add-qkv-bias"]
    assert f"num-layers: must be as in the checkpoint, got 6, in {tmp_path}/iter_0000007 4." in problems[0]
    problems = find(*MOE, "--load", str(tmp_path), "--no-load-optim")
    assert [problem.split(":")[0] for problem in problems][:2] == ["ffn-hidden-size", "num-experts"]


def test_flags_that_compute_something_else_from_the_same_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    save_with(monkeypatch, TINY, layernorm_epsilon=1e-6)
    flags = (*TINY, "--load", str(tmp_path))
    (problem,) = find(*flags)
    assert_problem(
        problem,
        "norm-epsilon:",
        "must be as in the checkpoint",
        f"got 1e-05, in {tmp_path}/iter_0000007 1e-06",
        "--norm-epsilon",
        "--finetune",
    )
    assert find(*flags, "--norm-epsilon", "1e-6") == []
    assert find(*flags, "--finetune") == [problem]  # nobody said so
    assert find(*flags, "--finetune", "--norm-epsilon", "1e-5") == []
    problems = find(*flags, "--norm-epsilon", "1e-6", "--rotary-base", "500000", "--use-rope-scaling")
    assert [text.split(":")[0] for text in problems] == ["rotary-base", "use-rope-scaling"]
    yarn = ("--position-embedding-type", "yarn", "--rotary-scaling-factor", "4")
    problems = find(*flags, "--norm-epsilon", "1e-6", *yarn, "--window-size", "31,0")
    assert [text.split(":")[0] for text in problems] == ["position-embedding-type", "window-size"]


def test_a_release_has_neither_optimizer_nor_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path).rename(tmp_path / "release")
    (tmp_path / LATEST_FILE).write_text("release")
    save_with(monkeypatch, MOE, expert_model_parallel_size=2, lr=0.5)
    assert find(*MOE, "--load", str(tmp_path)) == []
    (problem,) = find(*MOE, "--load", str(tmp_path), "--norm-epsilon", "1e-3")
    assert problem.startswith("norm-epsilon: must be as in the checkpoint")


def test_arguments_that_another_megatron_did_not_save_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    opened = SimpleNamespace(args=argparse.Namespace(num_layers=5), iteration=7)
    monkeypatch.setattr(saved_run, "open_checkpoint", lambda path: opened)
    monkeypatch.setattr(saved_run, "find_visible_damage", lambda directory, has_hash_check: [])
    assert find(*TINY, "--load", str(tmp_path)) == []


@pytest.mark.parametrize(("saved_ep", "ep"), [(1, 2), (2, 1)])
def test_an_optimizer_of_another_expert_layout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_ep: int, ep: int
) -> None:
    write_checkpoint(tmp_path)
    save_with(monkeypatch, MOE, expert_model_parallel_size=saved_ep)
    flags = (*MOE, "--load", str(tmp_path), "--expert-model-parallel-size", str(ep), "--dry-run", "--world-size", "2")
    (problem,) = find(*flags)
    assert f"got ep={ep}, in" in problem
    tool = f"hammer checkpoint edit reshard --expert-model-parallel-size {ep}"
    remedy = f"Use --expert-model-parallel-size {saved_ep}, convert the checkpoint with {tool}, or pass --finetune, "
    assert f"{remedy}or --no-load-optim with --override-opt-param-scheduler." in problem
    assert find(*flags, "--finetune") == []
    assert find(*flags, "--no-load-optim", "--override-opt-param-scheduler") == []


def test_experts_may_change_between_parallel_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    save_with(monkeypatch, MOE, expert_model_parallel_size=2)
    flags = (*MOE, "--load", str(tmp_path), "--expert-model-parallel-size", "4", "--dry-run", "--world-size", "4")
    assert find(*flags) == []


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_unwritable("save", str(tmp_path / "a" / "b")) == []
    (tmp_path / "file").write_text("")
    (problem,) = find_unwritable("save", str(tmp_path / "file" / "run"))
    assert "save: must be a folder that can be written" in problem
    assert "is not a folder" in problem
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    (problem,) = find_unwritable("data_cache_path", str(tmp_path))
    assert f"data-cache-path: must be a folder that can be written, got data_cache_path={tmp_path}" in problem
    assert "is not writable" in problem
