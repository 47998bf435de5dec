"""Only a complete checkpoint is opened for editing; every fault is named."""

import re

import pytest

from megatron_hammer.checkpoint.surgery.training_checkpoint import (
    open_training_checkpoint,
    parameter_key,
    split_optimizer_key,
)
from megatron_hammer.errors import CheckpointError
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_training_checkpoint import RNG_KEY, write_training_checkpoint


def test_weights_and_optimizer_tensors_are_separated(tmp_path):
    write_training_checkpoint(tmp_path)
    checkpoint = open_training_checkpoint(tmp_path)
    assert (len(checkpoint.model), len(checkpoint.optimizer), checkpoint.iteration) == (9, 27, 10)
    assert checkpoint.list_objects("rng_state/") == [RNG_KEY]
    assert checkpoint.list_model_objects() == ["decoder.layers.mlp.linear_fc1._extra_state/shard_1_4"]


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("optimizer.state.exp_avg.decoder.layers.mlp.router.weight", ("exp_avg", "decoder.layers.mlp.router.weight")),
        ("optimizer.state.fp32_param.output_layer.weight", ("fp32_param", "output_layer.weight")),
        ("chained_0.optimizer.state.exp_avg.output_layer.weight", None),
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0", None),
        ("decoder.layers.mlp.router.weight", None),
    ],
)
def test_keys_of_the_optimizer(key, parts):
    assert split_optimizer_key(key) == parts
    assert parameter_key(key) == (parts[1] if parts else key)


def test_a_copy_of_the_state_leaves_the_source_alone(tmp_path):
    write_training_checkpoint(tmp_path)
    checkpoint = open_training_checkpoint(tmp_path)
    state = checkpoint.copy_common_state()
    state["args"].num_layers = 7
    state["optimizer"]["optimizer"]["param_groups"].clear()
    assert checkpoint.args.num_layers == 4
    assert checkpoint.store.common_state["optimizer"]["optimizer"]["param_groups"]


def test_truncated_files_are_named(tmp_path):
    write_training_checkpoint(tmp_path)
    path = tmp_path / "iter_0000010" / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: must hold at least {len(data)} bytes, got"):
        open_training_checkpoint(tmp_path)


def test_two_iterations_in_one_folder_are_refused(tmp_path):
    write_training_checkpoint(tmp_path)
    (tmp_path / "iter_0000010").rename(tmp_path / "iter_0000020")
    text = "state must be of iteration 20, got iteration=10. Files of two checkpoints are mixed; copy it again."
    with pytest.raises(CheckpointError, match=re.escape(text)):
        open_training_checkpoint(tmp_path, iteration=20)


def test_a_state_without_arguments_is_refused(tmp_path):
    write_toy_checkpoint(tmp_path, toy_llama_tensors(), common_state={"iteration": 10})
    with pytest.raises(CheckpointError, match=r"common state must hold args and iteration, got \['iteration'\]"):
        open_training_checkpoint(tmp_path)
