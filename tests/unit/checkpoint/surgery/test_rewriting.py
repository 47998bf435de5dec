"""A written checkpoint is compared bit by bit with its source before it gets its final name."""

import re

import pytest
import torch

from megatron_hammer.checkpoint.surgery.rewriting import (
    PlannedCheckpoint,
    PlannedTensor,
    copy_objects,
    plan_copy,
    write_planned_checkpoint,
)
from megatron_hammer.checkpoint.surgery.training_checkpoint import open_training_checkpoint
from megatron_hammer.checkpoint_files.pickle_writer import dump_object
from megatron_hammer.errors import ConversionError
from tests.helpers.toy_training_checkpoint import RNG_KEY, write_training_checkpoint

KEY = "decoder.final_layernorm.weight"


def planned(checkpoint, tensor):
    state = checkpoint.copy_common_state()
    return PlannedCheckpoint(tensors=[tensor], objects={}, common_state=state, iteration=10)


def test_a_copy_that_changes_between_writing_and_reading_back_is_refused(tmp_path):
    write_training_checkpoint(tmp_path / "old")
    checkpoint = open_training_checkpoint(tmp_path / "old")
    calls = []

    def read(offsets, sizes):
        calls.append(offsets)
        value = torch.zeros(sizes)
        return -value if len(calls) > 1 else value  # -0.0 is equal to 0.0, and other bits

    tensor = PlannedTensor(key=KEY, shape=(24,), dtype=torch.float32, boxes=[((0,), (24,))], read=read)
    text = f"{KEY}: what was written must read back equal, got a difference. Check the disk;"
    with pytest.raises(ConversionError, match=re.escape(text)):
        write_planned_checkpoint(tmp_path / "new", planned(checkpoint, tensor), sources=[checkpoint])
    assert not (tmp_path / "new").exists()


def test_objects_are_compared_too(tmp_path):
    write_training_checkpoint(tmp_path / "old")
    checkpoint = open_training_checkpoint(tmp_path / "old")
    answers = iter([dump_object(["first"]), dump_object(["second"])])
    plan = PlannedCheckpoint(
        tensors=[plan_copy(checkpoint, KEY)],
        objects={RNG_KEY: lambda: next(answers)},
        common_state=checkpoint.copy_common_state(),
        iteration=10,
    )
    with pytest.raises(ConversionError, match=f"{RNG_KEY}: what was written must read back equal"):
        write_planned_checkpoint(tmp_path / "new", plan, sources=[checkpoint])
    assert copy_objects(checkpoint, [RNG_KEY])[RNG_KEY]() == checkpoint.store.read_object_bytes(RNG_KEY)


def test_progress_counts_tensors(tmp_path):
    write_training_checkpoint(tmp_path / "old")
    checkpoint = open_training_checkpoint(tmp_path / "old")
    seen = []
    write_planned_checkpoint(
        tmp_path / "new",
        planned(checkpoint, plan_copy(checkpoint, KEY)),
        lambda *progress: seen.append(progress),
        sources=[checkpoint],
    )
    assert seen == [("writing", 1, 1), ("verifying", 1, 1)]
