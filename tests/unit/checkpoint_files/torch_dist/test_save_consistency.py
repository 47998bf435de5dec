"""Files of two iterations in one directory are noticed by the weights that are not their rounded fp32 copies."""

import pickle
import shutil

import pytest
import torch

from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.errors import CheckpointError
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint

FILES = ("__0_0.distcp", "__1_0.distcp")


def write_iteration(directory, iteration, *, has_masters=True):
    """Weights of bf16 and their fp32 copies, cut so that some lie in the other file."""
    masters = {key: value for key, value in toy_llama_tensors(seed=iteration).items() if "optimizer" not in key}
    tensors = {key: value.bfloat16() for key, value in masters.items()}
    if has_masters:
        tensors |= {f"optimizer.state.param.{key}": value for key, value in masters.items()}
    return write_toy_checkpoint(directory, tensors, iteration=iteration, num_chunks=1)


def test_files_of_one_save_pass(tmp_path):
    write_iteration(tmp_path, 10)
    assert (
        open_checkpoint(tmp_path).validate_one_save() == 2
    )  # the weights of each file against the copies of the other


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_iteration_is_named_and_nothing_is_written(tmp_path, name):
    target, other = write_iteration(tmp_path, 10), write_iteration(tmp_path, 20)
    state = pickle.loads((target / ".metadata").read_bytes()).storage_data
    common_file = next(info.relative_path for index, info in state.items() if index.fqn.startswith("common_state"))
    assert (other / name).stat().st_size == (target / name).stat().st_size
    shutil.copy(other / name, target / name)
    message = "must be of one save, got .* that is not its rounded fp32 copy. Files of two checkpoints are mixed"
    if name == common_file:
        message = "state must be of iteration 10, got iteration=20"
    with pytest.raises(CheckpointError, match=message):
        export_to_hugging_face(ExportOptions(load_dir=target, save_dir=tmp_path / "hf", verify="tensors"))
    assert not list(tmp_path.glob("hf*"))


def test_without_copies_or_their_files_there_is_nothing_to_compare(tmp_path):
    write_iteration(tmp_path, 10, has_masters=False)
    assert open_checkpoint(tmp_path).validate_one_save() == 0
    write_toy_checkpoint(
        tmp_path / "fp32", toy_llama_tensors() | {"optimizer.state.param.output_layer.weight": torch.ones(64, 24)}
    )
    assert open_checkpoint(tmp_path / "fp32").validate_one_save() == 0
