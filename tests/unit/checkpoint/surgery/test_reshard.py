"""Resharding moves numbers and changes none; the saved arguments and the optimizer's groups are those of the target."""

import re

import pytest
import torch

from megatron_hammer.checkpoint.surgery.reshard import TargetLayout, reshard
from megatron_hammer.errors import CheckpointError, ConversionError, OutputError
from tests.helpers.messages import assert_problems
from tests.helpers.toy_training_checkpoint import (
    RERUN_KEY,
    RNG_KEY,
    model_tensors,
    optimizer_state,
    optimizer_tensors,
    read_all,
    training_arguments,
    write_training_checkpoint,
)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("target", [{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}, {}])
def test_weights_and_optimizer_are_moved_bit_for_bit(tmp_path, target):
    tensors = write_training_checkpoint(tmp_path / "old")
    report = reshard(tmp_path / "old", tmp_path / "new", TargetLayout(**target))
    found, store = read_all(tmp_path / "new")
    assert_equal(found, tensors)
    assert (report.num_weights, report.num_optimizer_tensors) == (9, 27)
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert store.common_state["optimizer"] == optimizer_state()
    assert store.common_state["opt_param_scheduler"] == {"num_steps": 80}
    assert store.common_state["args"].consumed_train_samples == 80


def test_arguments_and_states_follow_the_layout(tmp_path):
    write_training_checkpoint(
        tmp_path / "old", arguments=training_arguments(decoder_first_pipeline_num_layers=1, world_size=3)
    )
    target = TargetLayout(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2
    )
    report = reshard(tmp_path / "old", tmp_path / "new", target)
    _, store = read_all(tmp_path / "new")
    args = store.common_state["args"]
    found = {
        name: getattr(args, name)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_tensor_parallel_size")
    }
    assert found == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    }
    assert (args.virtual_pipeline_model_parallel_size, args.decoder_first_pipeline_num_layers) == (2, None)
    assert (args.world_size, args.data_parallel_size, args.padded_vocab_size) == (4, 1, 64)
    assert (report.layout_before, report.layout) == ("TP1 PP1 EP1", "TP2 PP2 VPP2 EP1")
    # The old ranks' random states would be looked for, and are not there.
    assert args.no_save_rng is True
    assert_problems(report.notes, ("random states", "left out", "--seed"))
    assert store.objects == ("decoder.layers.mlp.linear_fc1._extra_state/shard_1_4",)
    assert "rerun_state_machine" not in store.common_state


def test_the_same_layout_keeps_what_the_ranks_keep(tmp_path):
    write_training_checkpoint(tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", TargetLayout(tensor_model_parallel_size=1))
    _, store = read_all(tmp_path / "new")
    assert set(store.objects) >= {RNG_KEY, RERUN_KEY}
    assert store.read_object(RNG_KEY) == [f"state of {RNG_KEY}"]
    assert not hasattr(store.common_state["args"], "no_save_rng")
    assert store.common_state["rerun_state_machine"] == {"mode": "off"}


def test_experts_get_an_optimizer_and_give_it_back(tmp_path):
    tensors = write_training_checkpoint(tmp_path / "ep1", is_moe=True)
    reshard(tmp_path / "ep1", tmp_path / "ep3", TargetLayout(expert_model_parallel_size=3))
    reshard(tmp_path / "ep3", tmp_path / "again", TargetLayout(expert_model_parallel_size=1))
    for name, is_chained, ep in (("ep3", True, 3), ("again", False, 1)):
        found, store = read_all(tmp_path / name)
        assert_equal(found, tensors)
        assert store.common_state["optimizer"] == optimizer_state(is_chained=is_chained)
        assert store.common_state["args"].expert_model_parallel_size == ep
        assert RNG_KEY in store.objects  # tensor and pipeline ranks are the same
    assert store.common_state["args"].world_size == 3  # 1 rank would do again; 3 still tile it


def test_experts_with_a_tensor_parallel_size_of_their_own_have_an_optimizer_too(tmp_path):
    """Megatron compares the two sizes: use_expert_pgs of ColumnParallelLinear."""
    arguments = training_arguments(is_moe=True, moe_shared_expert_intermediate_size=None, moe_shared_expert_gate=False)
    write_training_checkpoint(tmp_path / "old", is_moe=True, arguments=arguments)
    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    reshard(tmp_path / "old", tmp_path / "etp1", TargetLayout(**sizes))
    reshard(tmp_path / "etp1", tmp_path / "etp2", TargetLayout(expert_tensor_parallel_size=2))
    for name, is_chained in (("etp1", True), ("etp2", False)):
        _, store = read_all(tmp_path / name)
        assert store.common_state["args"].expert_model_parallel_size == 1
        assert store.common_state["optimizer"] == optimizer_state(is_chained=is_chained)


def test_boxes_are_those_of_the_target(tmp_path):
    write_training_checkpoint(tmp_path / "old")
    reshard(tmp_path / "old", tmp_path / "new", TargetLayout(tensor_model_parallel_size=2))
    _, store = read_all(tmp_path / "new")
    chunks = store.tensors["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"].chunks
    assert [chunk.offsets for chunk in chunks][:5] == [(0, 0, 0), (0, 10, 0), (0, 20, 0), (0, 30, 0), (1, 0, 0)]
    assert {chunk.sizes for chunk in chunks} == {(1, 10, 24)}


def test_padding_of_the_vocabulary_follows_tensor_parallelism(tmp_path):
    arguments = training_arguments(make_vocab_size_divisible_by=20, padded_vocab_size=60)
    tensors = model_tensors()
    tensors = {key: tensor[:60] if tensor.shape[0] == 64 else tensor for key, tensor in tensors.items()}
    tensors |= optimizer_tensors(tensors)
    write_training_checkpoint(tmp_path / "tp1", tensors=tensors, arguments=arguments)
    reshard(tmp_path / "tp1", tmp_path / "tp2", TargetLayout(tensor_model_parallel_size=2))
    wider, store = read_all(tmp_path / "tp2")
    assert store.common_state["args"].padded_vocab_size == 80
    for key, tensor in tensors.items():
        if tensor.shape[0] == 60:
            assert wider[key].shape == (80, 24)
            assert torch.equal(wider[key][:53], tensor[:53])
            assert not wider[key][53:].any()
        else:
            assert torch.equal(wider[key], tensor)
    reshard(tmp_path / "tp2", tmp_path / "again", TargetLayout(tensor_model_parallel_size=1))
    again, _ = read_all(tmp_path / "again")
    assert all(torch.equal(again[key][:53], tensors[key][:53]) for key in tensors)
    assert again["output_layer.weight"].shape == (60, 24)


def test_arguments_that_do_not_say_how_the_vocabulary_is_padded_are_named(tmp_path):
    arguments = training_arguments()
    del arguments.make_vocab_size_divisible_by
    tensors = model_tensors()
    write_training_checkpoint(tmp_path / "tp1", tensors=tensors | optimizer_tensors(tensors), arguments=arguments)
    with pytest.raises(CheckpointError, match="make_vocab_size_divisible_by: the checkpoint's arguments must hold it"):
        reshard(tmp_path / "tp1", tmp_path / "tp2", TargetLayout(tensor_model_parallel_size=2))
    assert not (tmp_path / "tp2").exists()


def test_a_target_that_does_not_fit_is_refused_by_every_reason(tmp_path):
    write_training_checkpoint(tmp_path / "old", is_moe=True)
    target = TargetLayout(tensor_model_parallel_size=3, pipeline_model_parallel_size=3, expert_model_parallel_size=4)
    with pytest.raises(ConversionError) as caught:
        reshard(tmp_path / "old", tmp_path / "new", target)
    text = str(caught.value)
    assert "tensor-model-parallel-size: must divide num_query_groups or be a multiple of it, got tp=3" in text
    assert "pipeline-model-parallel-size: must divide num_layers, got pp=3, num_layers=4." in text
    assert "expert-model-parallel-size: must divide num_experts, got ep=4, num_experts=6." in text
    assert not (tmp_path / "new").exists()


def test_a_size_of_0_does_not_stand_for_the_checkpoints(tmp_path):
    write_training_checkpoint(tmp_path / "old")
    target = TargetLayout(tensor_model_parallel_size=0, decoder_last_pipeline_num_layers=-1)
    with pytest.raises(ConversionError) as caught:
        reshard(tmp_path / "old", tmp_path / "new", target)
    assert_problems(
        caught.value.problems,
        ("tensor-model-parallel-size: must be at least 1, got tensor-model-parallel-size=0.",),
        ("decoder-last-pipeline-num-layers: must be at least 1, got decoder-last-pipeline-num-layers=-1.",),
    )


def test_an_optimizer_tied_to_its_layout_is_refused(tmp_path):
    write_training_checkpoint(tmp_path / "old", sharding="dp_reshardable")
    text = (
        "optimizer must be stored as fully_reshardable, got dp_reshardable. "
        "Resume once at its own layout and save with --dist-ckpt-optim-fully-reshardable."
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        reshard(tmp_path / "old", tmp_path / "new", TargetLayout(tensor_model_parallel_size=2))


def test_optimizer_state_without_its_parameter_is_named(tmp_path):
    model = model_tensors()
    stray = {"optimizer.state.exp_avg.decoder.unknown.weight": torch.ones(3, 5)}
    misshapen = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(7)}
    write_training_checkpoint(tmp_path / "old", tensors={**model, **stray, **misshapen})
    with pytest.raises(CheckpointError) as caught:
        reshard(tmp_path / "old", tmp_path / "new", TargetLayout())
    text = str(caught.value)
    assert "unknown.weight: optimizer state must have the shape of its parameter, got (3, 5) for no such par" in text
    assert "final_layernorm.weight: optimizer state must have the shape of its parameter, got (7,) for (24,)" in text


def test_a_number_that_is_not_finite_is_named_and_nothing_is_left(tmp_path):
    tensors = model_tensors()
    tensors["decoder.layers.mlp.linear_fc2.weight"][3, 5, 7] = float("nan")
    write_training_checkpoint(tmp_path / "old", tensors=tensors)
    text = "decoder.layers.mlp.linear_fc2.weight: values must be finite, got NaN or infinity. Use an earlier iteration."
    with pytest.raises(ConversionError, match=re.escape(text)):
        reshard(tmp_path / "old", tmp_path / "new", TargetLayout())
    assert not (tmp_path / "new").exists()


def test_the_source_is_never_the_target(tmp_path):
    tensors = write_training_checkpoint(tmp_path / "old")
    text = f"target must not be or hold the input {tmp_path / 'old'}"
    with pytest.raises(OutputError, match=re.escape(text)):
        reshard(tmp_path / "old", tmp_path / "old", TargetLayout(), overwrite=True)
    assert_equal(read_all(tmp_path / "old")[0], tensors)
