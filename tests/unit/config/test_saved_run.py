import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hammer.config import saved_run
from megatron_hammer.config.saved_run import describe_weights, find_checkpoint_to_load, read_saved_run
from tests.helpers.parsed_flags import TINY, parse


def read_with(args: argparse.Namespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> saved_run.SavedRun:
    (folder / ".metadata").touch()
    saved_run.open_saved_run.cache_clear()
    monkeypatch.setattr(saved_run, "open_checkpoint", lambda path: SimpleNamespace(args=args, iteration=7))
    return read_saved_run(folder)


def test_a_saved_run_is_read_as_its_command_line_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parse(*TINY)
    plan = arguments.require_plan()
    saved = read_with(arguments.namespace, tmp_path, monkeypatch)
    assert (saved.model, saved.schedule, saved.batch) == (plan.model, plan.schedule, plan.batch)
    assert saved.order == plan.order
    assert (saved.iteration, saved.expert_model_parallel_size, saved.has_optimizer) == (7, 1, True)


def test_a_part_that_another_megatron_lacks_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(**vars(parse(*TINY).namespace))
    del args.lr_decay_style
    saved = read_with(args, tmp_path, monkeypatch)
    assert (saved.schedule, saved.order) == (None, None)
    assert saved.model is not None
    assert saved.batch is not None


def test_the_weights_of_a_folder_that_cannot_be_there() -> None:
    """A dry run asks even where preflight has found that --load makes no sense."""
    checkpoints = dataclasses.replace(parse(*TINY).settings.checkpoints, load="a" * 300)
    assert find_checkpoint_to_load(checkpoints) is None
    assert describe_weights(checkpoints, None) == "random"
