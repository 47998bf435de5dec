"""Weights of a legacy checkpoint come out of every edit under torch_dist's keys, bit for bit."""

import enum
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hammer.checkpoint.surgery.legacy_source import LegacyStore
from megatron_hammer.checkpoint.surgery.reshard import TargetLayout, reshard
from megatron_hammer.checkpoint.surgery.resize_vocabulary import NewVocabulary, resize_vocabulary
from megatron_hammer.checkpoint.surgery.weights_only import keep_weights
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.torch_dist.store import COMMON_STATE_KEY, TorchDistStore
from tests.helpers.toy_legacy_checkpoint import legacy_arguments, llama_weights, write_legacy_checkpoint

QKV = "decoder.layers.self_attention.linear_qkv.weight"


def write(folder):
    """TP2 x PP2; returns the weights by mcore name."""
    weights = llama_weights()
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "make_vocab_size_divisible_by": 16}
    write_legacy_checkpoint(folder, weights, tp=2, stages=((2,), (2,)), arguments=legacy_arguments(**sizes))
    return weights


def test_boxes_of_layers(tmp_path):
    weights = write(tmp_path)
    store = LegacyStore(tmp_path / "iter_0000010")
    whole = torch.stack([weights[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] for i in range(4)])
    assert store.tensors[QKV].shape == (4, 40, 24)
    assert torch.equal(store.read(QKV, (0, 0, 0), (4, 40, 24)), whole)
    assert torch.equal(store.read(QKV, (1, 3, 5), (2, 30, 7)), whole[1:3, 3:33, 5:12])
    assert not torch.equal(store.read(QKV, (0, 3, 5), (2, 30, 7)), whole[1:3, 3:33, 5:12])
    assert torch.equal(store.read("output_layer.weight", (9, 0), (3, 24)), weights["output_layer.weight"][9:12])
    assert len(store.tensors[QKV].chunks) == 4
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_3_4" in store.objects


@pytest.mark.parametrize("edit", ["weights-only", "reshard"])
def test_an_edit_gives_a_release_with_the_same_weights(tmp_path, edit):
    weights = write(tmp_path / "old")
    if edit == "weights-only":
        keep_weights(tmp_path / "old", tmp_path / "new")
    else:
        target = TargetLayout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        report = reshard(tmp_path / "old", tmp_path / "new", target)
        assert (report.layout_before, report.layout, report.iteration) == ("TP2 PP2 EP1", "TP1 PP1 EP1", None)
    reader = open_checkpoint(tmp_path / "new")
    assert reader.directory.name == "release"
    assert reader.tensors.keys() == weights.keys()
    rows = 64  # a vocabulary of 53, padded
    for name, tensor in weights.items():
        found = reader.read(name)
        kept = 53 if tensor.shape[0] == rows else tensor.shape[0]
        assert torch.equal(found[:kept], tensor[:kept])


def test_the_vocabulary_of_a_legacy_checkpoint(tmp_path):
    weights = write(tmp_path / "old")
    resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=60))
    rows = open_checkpoint(tmp_path / "new").read("output_layer.weight")
    expected = weights["output_layer.weight"][:53].double().mean(dim=0).float()
    assert torch.equal(rows[53:60], expected.expand(7, 24))


def test_arguments_with_types_of_megatron_and_numpy_are_written_back(tmp_path, monkeypatch):
    """They are inert in the edited arguments; a Megatron that reads the edited checkpoint gets its own types again."""
    module = types.ModuleType("megatron.core.toy_types")
    module.Mode = enum.Enum("Mode", {"FAST": "fast"}, module=module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    args = legacy_arguments(attention_backend=module.Mode.FAST, betas=np.array([0.9, 0.95]), folder=Path("a"))
    write_legacy_checkpoint(tmp_path / "old", llama_weights(), arguments=args)
    keep_weights(tmp_path / "old", tmp_path / "new")
    written = TorchDistStore(tmp_path / "new" / "release").read_object_bytes(COMMON_STATE_KEY)
    found = torch.serialization.load(io.BytesIO(written), weights_only=False)[0]["args"]
    assert found.attention_backend is module.Mode.FAST
    assert found.betas.tolist() == [0.9, 0.95]
    assert found.folder == Path("a")
