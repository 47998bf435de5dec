"""Weights are kept bit for bit, the state of the run is dropped, and training accepts the result for a new run."""

import torch

from megatron_hammer.checkpoint.surgery.weights_only import keep_weights
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from tests.helpers.toy_training_checkpoint import read_all, write_training_checkpoint


def test_weights_are_kept_and_the_state_of_the_run_is_dropped(tmp_path):
    tensors = write_training_checkpoint(tmp_path / "run")
    report = keep_weights(tmp_path / "run", tmp_path / "weights")
    found, store = read_all(tmp_path / "weights", "release")
    assert found.keys() == {key for key in tensors if not key.startswith("optimizer.")}
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in found.items())
    assert store.objects == ("decoder.layers.mlp.linear_fc1._extra_state/shard_1_4",)
    assert store.common_state.keys() == {"args", "iteration", "checkpoint_version", "content_metadata"}
    args = store.common_state["args"]
    assert (args.consumed_train_samples, args.consumed_valid_samples) == (0, 0)
    assert not hasattr(args, "data_order_record")
    assert (args.no_save_optim, args.no_save_rng) == (True, True)
    assert (tmp_path / "weights" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (report.num_weights, report.num_dropped_tensors, report.num_dropped_objects) == (9, 27, 2)
    assert report.num_bytes < report.num_bytes_before / 2


def test_the_result_is_read_as_any_other_checkpoint(tmp_path):
    tensors = write_training_checkpoint(tmp_path / "run")
    keep_weights(tmp_path / "run", tmp_path / "weights")
    reader = open_checkpoint(tmp_path / "weights")
    assert reader.iteration == 10  # what the weights are of
    key = "decoder.layers.self_attention.linear_qkv.weight"
    assert torch.equal(reader.read("decoder.layers.2.self_attention.linear_qkv.weight"), tensors[key][2])


def test_a_release_is_taken_too(tmp_path):
    tensors = write_training_checkpoint(tmp_path / "run", iteration=None)
    report = keep_weights(tmp_path / "run", tmp_path / "weights")
    assert report.num_dropped_tensors == 27
    assert torch.equal(
        read_all(tmp_path / "weights", "release")[0]["output_layer.weight"], tensors["output_layer.weight"]
    )
