"""Checkpoints that are damaged, mixed, incomplete or malicious: what a run loads then, and what it says.

Most cases ask, in this process, the function that decides at the start of every run, about copies of one small run's
folder. The others are real runs. The long part (`-m long`) makes 200 random corruptions.
"""

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HASHES_FILE, require_intact, write_hashes
from megatron_hammer.checkpoint_files.torch_dist.store import COMMON_STATE_KEY
from megatron_hammer.config import saved_run
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.errors import CheckpointError
from megatron_hammer.training.saving.resumption import agree_on_checkpoint
from tests.helpers.parsed_flags import parse
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_lines, run, write_toy_data

pytestmark = pytest.mark.distributed
FLAGS = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "6", "--save-interval", "2")
NEWEST, BEFORE = "iter_0000006", "iter_0000004"
NUM_RANDOM_CORRUPTIONS = 200
Corruption = Callable[[Path], str]  # of the folder of --save; returns the name of the file that a message must name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks, and the data that it read."""
    folder = tmp_path_factory.mktemp("saved")
    write_toy_data(folder / "data")
    result = run(2, *FLAGS, "--data-path", str(folder / "data"), "--save", str(folder / "run"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (folder / "run").glob("iter_*")) == ["iter_0000002", BEFORE, NEWEST]
    return folder


@pytest.fixture(scope="module")
def plan(saved: Path) -> RunPlan:
    arguments = parse(*FLAGS, "--data-path", str(saved / "data"), "--save", str(saved / "run"))
    return arguments.require_plan()


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "run", tmp_path / "run")
    saved_run._choose.cache_clear()
    return tmp_path / "run"


def settle(plan: RunPlan, folder: Path, **changes: Any) -> tuple[str | None, str]:
    """The iteration that a run would load, and all that it would say."""
    saved_run._choose.cache_clear()
    terminal = io.StringIO()
    checkpoints = dataclasses.replace(plan.checkpoints, save=str(folder), load=str(folder), **changes)
    try:
        agreed = agree_on_checkpoint(dataclasses.replace(plan, checkpoints=checkpoints), terminal).checkpoints.agreed
    except CheckpointError as error:
        return None, str(error)
    assert agreed is not None
    return None if agreed.directory is None else agreed.directory.name, terminal.getvalue()


# --- one corruption each --------------------------------------------------------------------------------------------


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def flip_in_the_middle(folder: Path) -> str:
    path = folder / NEWEST / "__1_0.distcp"
    flip_bit(path, path.stat().st_size // 2)
    return path.name


def take_a_shard_of_another_iteration(folder: Path) -> str:
    shutil.copy(folder / BEFORE / "__0_0.distcp", folder / NEWEST / "__0_0.distcp")
    return "__0_0.distcp"


def cut_a_shard(folder: Path) -> str:
    os.truncate(folder / NEWEST / "__1_0.distcp", 100_000)
    return "__1_0.distcp"


def lose(name: str) -> Corruption:
    def corrupt(folder: Path) -> str:
        (folder / NEWEST / name).unlink()
        return name

    return corrupt


def keep_half_of_a_save(folder: Path) -> str:
    """As a save of an older version leaves it when it is killed, with the tracker naming it."""
    for name in (".metadata", "metadata.json", HASHES_FILE, "__1_0.distcp"):
        (folder / NEWEST / name).unlink()
    return NEWEST


def replace(name: str, content: str) -> Corruption:
    def corrupt(folder: Path) -> str:
        (folder / NEWEST / name).write_text(content)
        return name

    return corrupt


def lose_the_folder(folder: Path) -> str:
    shutil.rmtree(folder / NEWEST)
    return NEWEST


CORRUPTIONS = {
    "bit": flip_in_the_middle,
    "mixed": take_a_shard_of_another_iteration,
    "cut": cut_a_shard,
    "shard": lose("__0_0.distcp"),
    "metadata": lose(".metadata"),
    "description": lose("metadata.json"),
    "half": keep_half_of_a_save,
    "gone": lose_the_folder,
    "other-backend": replace("metadata.json", json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1})),
    "no-json": replace("metadata.json", "{"),
    "empty-hashes": replace(HASHES_FILE, "{}"),
    "stray": replace("common.pt", "not of this save"),
}


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_a_damaged_iteration_is_passed_over_by_name(copy: Path, plan: RunPlan, name: str) -> None:
    file = CORRUPTIONS[name](copy)
    iteration, said = settle(plan, copy)
    assert iteration == BEFORE, said
    assert f"{NEWEST} is passed over: " in said
    assert file in said
    assert f"continuing from {BEFORE}, the newest intact iteration" in said
    iteration, said = settle(plan, copy, step=6)  # --ckpt-step takes no other
    assert iteration is None
    assert file in said


@pytest.mark.parametrize("tracker", [None, "", "six", "99", "\x00\x00"])
def test_a_run_without_a_good_tracker_is_not_begun_afresh(copy: Path, plan: RunPlan, tracker: str | None) -> None:
    (copy / LATEST_FILE).unlink()
    if tracker is not None:
        (copy / LATEST_FILE).write_text(tracker)
    iteration, said = settle(plan, copy)
    assert iteration == NEWEST, said
    assert LATEST_FILE in said
    for directory in copy.glob("iter_*"):
        (directory / "__0_0.distcp").unlink()
    iteration, said = settle(plan, copy)
    assert iteration is None
    assert "must hold an intact iteration, got none of" in said


def test_an_iteration_without_hashes_is_loaded_with_a_message(copy: Path, plan: RunPlan) -> None:
    (copy / NEWEST / HASHES_FILE).unlink()
    iteration, said = settle(plan, copy)
    assert iteration == NEWEST
    assert "was saved without hashes" in said
    flip_in_the_middle(copy)  # torch's own checksums still find this
    iteration, said = settle(plan, copy)
    assert iteration == BEFORE
    assert "__1_0.distcp" in said


def test_verification_can_be_left_out(copy: Path, plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_hammer.platforms.checkpoint_verification._verified", set())
    flip_in_the_middle(copy)
    assert settle(plan, copy, is_verified=False) == (NEWEST, "")


def corrupt_at_random(folder: Path, generator: random.Random) -> str:
    """Change one file of the newest iteration; returns its name."""
    path = generator.choice(sorted((folder / NEWEST).iterdir()))
    size = path.stat().st_size
    kind = generator.choice(["flip", "flip", "flip", "cut", "lose", "zero", "swap", "grow"])
    if kind == "flip":
        flip_bit(path, generator.randrange(size), generator.randrange(8))
    elif kind == "cut":
        os.truncate(path, generator.randrange(size))
    elif kind == "lose" and path.name != HASHES_FILE:  # without hashes, it would be a checkpoint of another program
        path.unlink()
    elif kind == "zero" and path.suffix == ".distcp":
        content = bytearray(path.read_bytes())
        start = generator.randrange(size)
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        if content == path.read_bytes():  # were zeros
            flip_bit(path, start)
        else:
            path.write_bytes(content)
    elif kind == "swap" and path.name not in ("metadata.json", ".metadata"):  # these are alike
        shutil.copy(folder / BEFORE / path.name, path)
    else:
        path.write_bytes(path.read_bytes() + b"x")
    return path.name


def check_random_corruptions(copy: Path, plan: RunPlan, number: int) -> None:
    pristine = copy.with_name("pristine")
    shutil.copytree(copy / NEWEST, pristine)
    generator = random.Random(20)
    for index in range(number):
        name = corrupt_at_random(copy, generator)
        iteration, said = settle(plan, copy)
        assert iteration == BEFORE, (index, name, said)
        # What damaged hashes name may be another file: one whose hash has changed.
        assert f"/{NEWEST}/" in said, (index, name, said)
        assert name in said or name == HASHES_FILE, (index, name, said)
        shutil.rmtree(copy / NEWEST)
        shutil.copytree(pristine, copy / NEWEST)
    assert settle(plan, copy) == (NEWEST, "")


def test_some_random_corruptions_are_all_found(copy: Path, plan: RunPlan) -> None:
    check_random_corruptions(copy, plan, 20)


@pytest.mark.long
def test_every_random_corruption_is_found(copy: Path, plan: RunPlan) -> None:
    check_random_corruptions(copy, plan, NUM_RANDOM_CORRUPTIONS)


# --- real runs ------------------------------------------------------------------------------------------------------


def test_a_run_falls_back_on_all_ranks_and_computes_the_same_again(copy: Path, saved: Path) -> None:
    (copy / "metrics.jsonl").rename(copy / "before.jsonl")
    flip_in_the_middle(copy)
    result = run(2, *FLAGS, "--data-path", str(saved / "data"), "--save", str(copy))
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{NEWEST} is passed over: " in result.stdout
    again, before = read_lines(copy / "metrics.jsonl"), read_lines(copy / "before.jsonl")
    assert [line["step"] for line in again] == [5, 6]
    assert [line["loss"] for line in again] == [line["loss"] for line in before[4:]]
    assert [line["grad_norm"] for line in again] == [line["grad_norm"] for line in before[4:]]
    assert require_intact(copy / NEWEST)
    assert (copy / LATEST_FILE).read_text() == "6"


class Intruder:
    """Unpickled by Python, it makes the folder `ran`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def put_into_metadata_of_a_rank(directory: Path, intruder: Intruder) -> None:
    """torch reads it where there is no .metadata."""
    (directory / ".metadata").rename(directory / "kept")
    (directory / "__0.metadata").write_bytes(pickle.dumps(intruder))


def put_into_common_state(directory: Path, intruder: Intruder) -> None:
    """Behind the shard of rank 0, where the metadata then says that the common state lies."""
    with (directory / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == COMMON_STATE_KEY)
    content = io.BytesIO()
    torch.save([intruder], content)
    with (directory / place.relative_path).open("ab") as shard:
        place.offset, place.length = shard.tell(), len(content.getvalue())
        shard.write(content.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_common_file(directory: Path, intruder: Intruder) -> None:
    """Megatron before 0.19 had it, and 0.19 prefers it where it exists."""
    torch.save({"args": None, "iteration": 6, "intruder": intruder}, directory / "common.pt")


def put_into_legacy_file(directory: Path, intruder: Intruder) -> None:
    shutil.rmtree(directory)
    (directory / "mp_rank_00").mkdir(parents=True)
    torch.save({"iteration": 6, "intruder": intruder}, directory / "mp_rank_00" / "model_optim_rng.pt")


WAYS_IN = {
    function.__name__.removeprefix("put_into_"): function
    for function in (
        put_into_metadata_of_a_rank,
        put_into_common_state,
        put_into_common_file,
        put_into_legacy_file,
    )
}
ROUTES = {
    "load": ("--load", "{run}", "--no-verify-checkpoint"),
    "pretrained": ("--pretrained-checkpoint", "{run}"),
}


@pytest.mark.parametrize(
    ("way", "route"),
    [
        ("metadata_of_a_rank", "load"),
        ("common_state", "pretrained"),
        ("common_file", "load"),
        ("legacy_file", "load"),
    ],
)
def test_no_pickle_of_a_checkpoint_runs_code(copy: Path, saved: Path, tmp_path: Path, way: str, route: str) -> None:
    """With hashes that fit, and no older iteration: nothing but the unpickler is left to stop it."""
    for name in ("iter_0000002", BEFORE):
        shutil.rmtree(copy / name)
    WAYS_IN[way](copy / NEWEST, Intruder(tmp_path / "ran"))
    write_hashes(copy / NEWEST)
    flags = [flag.format(run=copy) for flag in ROUTES[route]]
    result = run(1, *FLAGS, "--data-path", str(saved / "data"), "--save", str(tmp_path / "new"), *flags)
    assert not (tmp_path / "ran").exists()
    assert result.returncode == 2, (result.stdout, result.stderr[-3000:])
    assert str(copy / NEWEST) in result.stderr
    assert "Traceback" not in result.stderr


def test_no_pickle_of_a_non_persistent_checkpoint_runs_code(copy: Path, saved: Path, tmp_path: Path) -> None:
    other = copy / "non_persistent"
    other.mkdir()
    (copy / NEWEST).rename(other / NEWEST)
    (copy / LATEST_FILE).write_text("4")
    (other / LATEST_FILE).write_text("6")
    put_into_common_state(other / NEWEST, Intruder(tmp_path / "ran"))
    write_hashes(other / NEWEST)
    flags = ("--non-persistent-ckpt-type", "global", "--non-persistent-save-interval", "100")
    result = run(1, *FLAGS, "--data-path", str(saved / "data"), "--save", str(copy), *flags)
    assert not (tmp_path / "ran").exists()
    assert result.returncode != 0
    assert "it is damaged, or made to run code" in result.stderr, result.stderr[-3000:]
