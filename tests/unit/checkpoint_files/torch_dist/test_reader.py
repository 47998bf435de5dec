"""Reading torch_dist: any chunks, stacked or separate layers; every kind of damage is named."""

import pickle
import subprocess
import sys

import pytest
import torch

from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.errors import CheckpointError
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_legacy_checkpoint import llama_weights, write_legacy_checkpoint
from tests.helpers.toy_model import toy_arguments

QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_every_layer_is_read_from_any_chunks(tmp_path, num_chunks):
    tensors = toy_llama_tensors(dtype=torch.bfloat16)
    write_toy_checkpoint(tmp_path, tensors, num_chunks=num_chunks)
    reader = open_checkpoint(tmp_path)
    assert reader.iteration == 10
    assert reader.args.hidden_size == 24
    assert len(reader.tensors) == 1 + 3 * 6 + 2  # without the optimizer's
    for layer in range(3):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        assert reader.tensors[name].shape == (40, 24)
        assert torch.equal(reader.read(name), tensors[QKV][layer])
    assert torch.equal(reader.read("output_layer.weight"), tensors["output_layer.weight"])
    assert torch.equal(reader.read("decoder.final_layernorm.weight"), tensors["decoder.final_layernorm.weight"])


def test_separate_layers_and_stacked_experts_have_the_same_names(tmp_path):
    fc1 = torch.randn(3, 5, 14, 24)
    stacked = {"decoder.layers.mlp.experts.experts.linear_fc1.weight": fc1}
    separate = {f"decoder.layers.{i}.mlp.experts.experts.linear_fc1.weight": fc1[i] for i in range(3)}
    write_toy_checkpoint(tmp_path / "stacked", stacked)
    write_toy_checkpoint(tmp_path / "separate", separate)
    readers = [open_checkpoint(tmp_path / name) for name in ("stacked", "separate")]
    assert readers[0].tensors.keys() == readers[1].tensors.keys()
    for reader in readers:
        assert torch.equal(reader.read("decoder.layers.2.mlp.experts.experts.4.linear_fc1.weight"), fc1[2, 4])


def test_norms_of_the_local_spec_get_the_fused_names(tmp_path):
    tensors = {
        "decoder.layers.input_layernorm.weight": torch.randn(3, 24),
        "decoder.layers.self_attention.linear_qkv.weight": torch.randn(3, 40, 24),
        "decoder.layers.pre_mlp_layernorm.weight": torch.randn(3, 24),
        "decoder.layers.mlp.router.weight": torch.randn(3, 5, 24),  # a mixture keeps its norm apart
    }
    write_toy_checkpoint(tmp_path, tensors)
    names = open_checkpoint(tmp_path).tensors
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in names


def write_with_master_weights(directory, prefix="optimizer.state.param.", **changes):
    """bf16 weights and, under `prefix`, fp32 ones that round to them; changes: key to another fp32 tensor or None."""
    masters = {key: value for key, value in toy_llama_tensors().items() if not key.startswith("optimizer.")}
    tensors = {key: value.bfloat16() for key, value in masters.items()}
    stored = {prefix + key: changes.get(key, value) for key, value in masters.items()}
    write_toy_checkpoint(directory, tensors | {key: value for key, value in stored.items() if value is not None})
    return tensors, masters


@pytest.mark.parametrize(
    "prefix", ["optimizer.state.param.", "optimizer.state.fp32_param.", "chained_1.optimizer.state.fp32_param."]
)
def test_master_weights_come_under_the_names_of_the_weights(tmp_path, prefix):
    tensors, masters = write_with_master_weights(tmp_path, prefix)
    model, master = open_checkpoint(tmp_path), open_checkpoint(tmp_path, weights="master")
    assert model.tensors.keys() == master.tensors.keys()
    master.remove_vocab_padding(53)
    for layer in range(3):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        assert torch.equal(model.read(name), tensors[QKV][layer])
        assert torch.equal(master.read(name), masters[QKV][layer])
        assert not torch.equal(master.read(name), model.read(name).float())
    assert torch.equal(master.read("output_layer.weight"), masters["output_layer.weight"][:53])


def test_weights_that_are_fp32_themselves_are_their_own_master(tmp_path):
    tensors = toy_llama_tensors()
    write_toy_checkpoint(tmp_path, tensors)
    assert torch.equal(
        open_checkpoint(tmp_path, weights="master").read("output_layer.weight"), tensors["output_layer.weight"]
    )


@pytest.mark.parametrize(
    "changes, num_lacking",
    [
        ({QKV: None}, 1),
        ({QKV: torch.zeros(3 * 40 * 24)}, 1),  # a flat buffer of a rank
        ({QKV: torch.zeros(3, 40, 24, dtype=torch.int16), "output_layer.weight": None}, 2),
    ],
)
def test_missing_master_weights_are_one_message(tmp_path, changes, num_lacking):
    write_with_master_weights(tmp_path, **changes)
    message = rf"fp32 master weights must be .*, got none of {num_lacking} tensors \({QKV}.*Pass --weights model"
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path, weights="master")
    assert len(caught.value.problems) == 1
    open_checkpoint(tmp_path)


def test_an_unknown_kind_of_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="weights: must be one of model, master, got ema"):
        open_checkpoint(tmp_path, weights="ema")


def test_the_padding_of_the_vocabulary_is_left_out(tmp_path):
    tensors = toy_llama_tensors()
    write_toy_checkpoint(tmp_path, tensors)
    reader = open_checkpoint(tmp_path)
    reader.remove_vocab_padding(53)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert reader.tensors[name].shape == (53, 24)
        assert torch.equal(reader.read(name), tensors[name][:53])


def test_the_iteration_is_the_latest_the_given_or_that_of_the_folder(tmp_path):
    for iteration in (5, 10):
        write_toy_checkpoint(tmp_path, toy_llama_tensors(seed=iteration), iteration=iteration)
    assert open_checkpoint(tmp_path).iteration == 10
    assert open_checkpoint(tmp_path, iteration=5).iteration == 5
    assert open_checkpoint(tmp_path / "iter_0000005").iteration == 5
    assert open_checkpoint(tmp_path / "iter_0000005", iteration=5).iteration == 5
    with pytest.raises(CheckpointError, match=r"iter_0000005: must be a directory of iterations .* iteration=10"):
        open_checkpoint(tmp_path / "iter_0000005", iteration=10)
    with pytest.raises(CheckpointError, match=r"iter_0000007: iteration does not exist, got \['iter_0000005'"):
        open_checkpoint(tmp_path, iteration=7)


def test_common_state_of_earlier_megatron_is_read(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    torch.save({"args": toy_arguments(seed=99), "iteration": 10}, target / "common.pt")
    assert open_checkpoint(tmp_path).args.seed == 99


def test_a_missing_directory_and_one_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: checkpoint directory does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"or be one iteration with its .metadata, got neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="must hold an iteration or 'release', got 'soon'"):
        open_checkpoint(tmp_path)


def test_truncated_and_missing_shards_are_all_named(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    (target / "__0_0.distcp").write_bytes((target / "__0_0.distcp").read_bytes()[:9000])
    (target / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="must hold at least") as caught:
        open_checkpoint(tmp_path)
    short, missing = caught.value.problems
    assert "__0_0.distcp" in short
    assert "got 9000 bytes" in short
    assert "__1_0.distcp" in missing
    assert "got no such file" in missing


def test_damaged_data_names_the_file_and_the_tensor(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    reader = open_checkpoint(tmp_path)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (target / name).write_bytes(bytes((target / name).stat().st_size))
    with pytest.raises(CheckpointError, match=r"_0.distcp: output_layer.weight must have the bytes that were saved at"):
        reader.read("output_layer.weight")


def test_a_chunk_that_no_rank_wrote_is_noticed(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    metadata = pickle.loads((target / ".metadata").read_bytes())
    metadata.state_dict_metadata["output_layer.weight"].chunks.pop()
    (target / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"output_layer.weight must have 1536 elements in its chunks, got 1152\b"):
        open_checkpoint(tmp_path).read("output_layer.weight")


def test_files_of_two_iterations_are_noticed(tmp_path):
    write_toy_checkpoint(tmp_path, toy_llama_tensors(), iteration=10)
    (tmp_path / "iter_0000010").rename(tmp_path / "iter_0000020")
    with pytest.raises(CheckpointError, match=r"state must be of iteration 20, got iteration=10\b"):
        open_checkpoint(tmp_path, iteration=20)


def test_other_formats_are_named(tmp_path):
    target = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    (target / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="got sharded_backend=zarr"):
        open_checkpoint(tmp_path)
    (target / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must name the sharded_backend"):
        open_checkpoint(tmp_path)


def test_a_legacy_checkpoint_is_opened_by_its_own_reader(tmp_path):
    weights = llama_weights()
    target = write_legacy_checkpoint(tmp_path, weights, tp=2)
    for path in (tmp_path, target):  # the directory given to --save, and one iteration of it
        reader = open_checkpoint(path)
        assert reader.tensors.keys() == weights.keys()
        assert torch.equal(reader.read("output_layer.weight"), weights["output_layer.weight"])


def test_a_checkpoint_without_arguments_is_refused(tmp_path):
    write_toy_checkpoint(tmp_path, toy_llama_tensors(), common_state={"iteration": 10})
    with pytest.raises(CheckpointError, match=r"common state must hold args and iteration, got \['iteration'\]"):
        open_checkpoint(tmp_path)


def test_reading_imports_no_megatron(tmp_path):
    write_toy_checkpoint(tmp_path, toy_llama_tensors())
    code = (
        "import sys; from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tmp_path)!r}).read('output_layer.weight'); "
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'transformers')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["metadata.json", "integrity.json"])
def test_a_description_that_is_a_link_to_nothing_is_not_absent(tmp_path, name):
    directory = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("gone")
    with pytest.raises(CheckpointError, match=rf"{name}: link must lead to a file, got gone"):
        open_checkpoint(tmp_path)


def test_checkpoints_of_two_formats_in_one_folder_are_refused(tmp_path):
    directory = write_toy_checkpoint(tmp_path, toy_llama_tensors())
    (directory / "mp_rank_00").mkdir()
    with pytest.raises(CheckpointError, match=r"must hold one checkpoint, got both \.metadata and mp_rank_\* folders"):
        open_checkpoint(tmp_path)
