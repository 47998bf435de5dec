"""torch and our reader read what the writer wrote; a checkpoint appears whole or not at all."""

import io
import os
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.torch_dist import content_hashes
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HashingFile, require_intact
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.checkpoint_files.torch_dist.writer import CheckpointWriter, open_checkpoint_writer
from megatron_hammer.errors import CheckpointError, ConversionError, OutputError
from tests.helpers.toy_checkpoint import cut, toy_llama_tensors
from tests.helpers.toy_model import toy_arguments

STATE = {"args": toy_arguments(), "iteration": 10, "checkpoint_version": 3.0}
TENSORS = {
    "a.half": torch.randn(7, 5).half(),
    "a.bf16": torch.randn(4, 3, 6).bfloat16(),
    "a.float": torch.randn(11),
    "a.bool": torch.randn(3, 2) > 0,
    "a.scalar": torch.tensor(2.5),
    "a.empty": torch.empty(0, 4),
}


def write(writer, tensors=TENSORS, num_chunks=2):
    for key, tensor in tensors.items():
        writer.declare(key, tensor.shape, tensor.dtype)
        for offsets, chunk in (
            cut(tensor, num_chunks) if tensor.dim() and tensor.numel() else [((0,) * tensor.dim(), tensor)]
        ):
            writer.write_chunk(key, offsets, chunk)
            assert torch.equal(writer.read_chunk(key, offsets), chunk)


class Interrupting(dict):
    """Tensors after which somebody presses Ctrl-C."""

    def items(self):
        yield from super().items()
        raise KeyboardInterrupt


def save(save_dir, *, iteration=10, tensors=TENSORS, overwrite=False, **state):
    with open_checkpoint_writer(save_dir, iteration=iteration, overwrite=overwrite) as writer:
        write(writer, tensors)
        writer.write_object("a._extra_state/shard_0_1", [None])
        writer.commit(STATE | state)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_torch_and_our_store_read_what_was_written(tmp_path, num_chunks):
    with open_checkpoint_writer(tmp_path / "save", iteration=10) as writer:
        write(writer, num_chunks=num_chunks)
        writer.write_object("a._extra_state/shard_0_1", [None])
        writer.commit(STATE)
    directory = tmp_path / "save" / "iter_0000010"
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == "10"
    loaded = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=directory, no_dist=True)
    store = TorchDistStore(directory)
    store.validate()
    assert (store.tensors.keys(), store.objects) == (TENSORS.keys(), ("a._extra_state/shard_0_1",))
    for key, tensor in TENSORS.items():
        assert torch.equal(loaded[key], tensor), key
        assert torch.equal(store.read(key, [0] * tensor.dim(), tensor.shape), tensor), key
    assert store.read_object("a._extra_state/shard_0_1") == [None]
    assert store.common_state == STATE


def test_the_models_reader_reads_a_release_and_a_numbered_iteration(tmp_path):
    tensors = toy_llama_tensors(dtype=torch.bfloat16)
    for iteration, name in ((None, "release"), (10, "iter_0000010")):
        save(tmp_path / name, iteration=iteration, tensors=tensors)
        reader = open_checkpoint(tmp_path / name)
        assert (reader.directory.name, reader.args.hidden_size) == (name, 24)
        name = "decoder.layers.2.mlp.linear_fc1.weight"
        assert torch.equal(reader.read(name), tensors["decoder.layers.mlp.linear_fc1.weight"][2])


def test_a_chunk_is_its_own_elements_only(tmp_path):
    """A view of a large storage must not drag the storage along, and a strided one is stored plainly."""
    large = torch.randn(1000, 40)
    writer = CheckpointWriter(tmp_path)
    writer.declare("rows", (4, 40), torch.float32)
    writer.declare("columns", (5, 1000), torch.float32)
    writer.write_chunk("rows", (0, 0), large[7:11])
    writer.write_chunk("columns", (0, 0), large.t()[3:8])
    assert torch.equal(writer.read_chunk("rows", (0, 0)), large[7:11])
    assert torch.equal(writer.read_chunk("columns", (0, 0)), large.t()[3:8])
    assert writer.read_chunk("columns", (0, 0)).is_contiguous()
    assert writer.num_bytes < (4 * 40 + 5 * 1000) * 4 + 4000
    writer.close()


def test_a_new_file_is_begun_beyond_the_limit(tmp_path):
    writer = CheckpointWriter(tmp_path, max_file_bytes=3000)
    write(writer, toy_llama_tensors())
    writer.commit(STATE)
    assert len(list(tmp_path.glob("__0_*.distcp"))) > 3
    store = TorchDistStore(tmp_path)
    for key, tensor in toy_llama_tensors().items():
        assert torch.equal(store.read(key, [0] * tensor.dim(), tensor.shape), tensor)


def test_data_is_aligned_for_memory_maps(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.write_object("odd/shard_0_1", "x" * 13)
    write(writer)
    offsets = [place.offset for place in writer._stored.values()]
    assert all(start % 64 == 0 for start in offsets)
    assert writer.read_chunk("a.float", (0,)).data_ptr() % 4 == 0
    writer.close()


def test_the_type_of_an_object_is_kept(tmp_path):
    save(tmp_path, args=Namespace(bf16=True, params_dtype=torch.bfloat16))
    state = TorchDistStore(tmp_path / "iter_0000010").common_state
    assert (state["args"].bf16, state["args"].params_dtype) == (True, torch.bfloat16)


def test_an_object_can_be_written_as_the_torch_file_that_it_is(tmp_path):
    file = io.BytesIO()
    torch.save({"rng": [1, 2]}, file)
    with open_checkpoint_writer(tmp_path, iteration=1) as writer:
        writer.write_object_bytes("rng_state/shard_0_1", file.getvalue())
        writer.commit(STATE)
    assert TorchDistStore(tmp_path / "iter_0000001").read_object("rng_state/shard_0_1") == {"rng": [1, 2]}


def test_damage_between_writing_and_reading_back_is_noticed(tmp_path):
    writer = CheckpointWriter(tmp_path)
    write(writer)
    writer._file.flush()
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ConversionError, match=r"__0_0.distcp: a.float must read back as it was written, got "):
        writer.read_chunk("a.float", (0,))
    writer.close()


def test_a_header_that_changes_between_writing_and_reading_back_is_noticed(tmp_path):
    writer = CheckpointWriter(tmp_path)
    write(writer, num_chunks=1)
    path = tmp_path / "__0_0.distcp"
    whole = path.read_bytes()
    place = writer._stored[("a.half", (0, 0))]
    elements = whole.index(TENSORS["a.half"].numpy().tobytes(), place.offset)
    end = elements + TENSORS["a.half"].nbytes
    # Every 9th byte of the archive around the elements: its headers, its pickle, its directory.
    around = [*range(place.offset, elements), *range(end, place.offset + place.length)][::9]
    for position in around:
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ConversionError, match=r"a\.half must read back as it was written"):
            writer.read_chunk("a.half", (0, 0))
    path.write_bytes(whole)
    assert torch.equal(writer.read_chunk("a.half", (0, 0)), TENSORS["a.half"])
    writer.close()


def test_the_hashes_computed_while_writing_are_those_of_the_files(tmp_path, monkeypatch):
    read_again = []
    hash_file = content_hashes.hash_file
    monkeypatch.setattr(content_hashes, "hash_file", lambda path: read_again.append(path.name) or hash_file(path))
    save(tmp_path)
    assert sorted(read_again) == [".metadata", "metadata.json"]
    assert require_intact(tmp_path / "iter_0000010")


@pytest.mark.parametrize(
    "misuse, message",
    [
        (lambda writer: writer.declare("a", (4, 3), torch.float32), "a is declared twice"),
        (lambda writer: writer.write_chunk("a", (0, 0), torch.zeros(2, 3)), "is no new box"),
        (lambda writer: writer.write_chunk("a", (3, 0), torch.zeros(2, 3)), "is no new box"),
        (lambda writer: writer.write_chunk("a", (2, 0), torch.zeros(2, 3).half()), "is no new box"),
        (lambda writer: writer.commit(STATE), "chunks do not cover a, b"),
    ],
)
def test_misuse_raises_an_internal_error(tmp_path, misuse, message):
    writer = CheckpointWriter(tmp_path)
    writer.declare("a", (4, 3), torch.float32)
    writer.declare("b", (2,), torch.float32)
    writer.write_chunk("a", (0, 0), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=message):
        misuse(writer)
    writer.close()


def test_a_block_without_commit_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match=r"ended without commit\(\)"),
        open_checkpoint_writer(tmp_path / "save", iteration=3) as writer,
    ):
        write(writer)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path):
    save(tmp_path / "save")
    before = sorted(tmp_path.rglob("*"))
    for save_dir in (tmp_path / "save", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            save(save_dir, iteration=11, tensors=Interrupting(TENSORS))
    assert sorted(tmp_path.rglob("*")) == before
    assert open_checkpoint(tmp_path / "save").iteration == 10


class InterruptedFile(HashingFile):
    """A file during whose writing somebody presses Ctrl-C."""

    def write(self, data):
        if len(data) > 1000:
            raise KeyboardInterrupt
        return super().write(data)


def test_an_interrupt_in_the_middle_of_a_tensor_is_an_interrupt(tmp_path):
    def write_interrupted():
        with open_checkpoint_writer(tmp_path / "save", iteration=3) as writer:
            writer.declare("a", (5000,), torch.float32)
            writer._file = InterruptedFile(os.devnull)
            writer.write_chunk("a", (0,), torch.ones(5000))

    with pytest.raises(KeyboardInterrupt):
        write_interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_elements", [10, 1_000_000])
def test_a_full_disk_is_one_sentence(tmp_path, num_elements):
    def write_to_full_disk():
        with open_checkpoint_writer(tmp_path / "save", iteration=3) as writer:
            writer.declare("a", (num_elements,), torch.float32)
            writer._file = HashingFile("/dev/full")
            writer.write_chunk("a", (0,), torch.ones(num_elements))
            writer.commit(STATE)

    with pytest.raises(OutputError, match=r"directory cannot be written \(No space left on device\)") as caught:
        write_to_full_disk()
    assert len(caught.value.problems) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_killed_writer_leaves_nothing_that_loads(tmp_path, is_committed):
    if (child := os.fork()) == 0:
        with open_checkpoint_writer(tmp_path / "save", iteration=None) as writer:
            write(writer)
            if is_committed:
                writer.commit(STATE)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.suffix for path in (tmp_path / "save").iterdir()] == [".partial"]
    with pytest.raises(CheckpointError, match=r"must hold latest_checkpointed_iteration.txt"):
        open_checkpoint(tmp_path / "save")
    save(tmp_path / "save", iteration=None)
    assert sorted(path.name for path in (tmp_path / "save").iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]


def test_an_existing_target_is_replaced_only_when_asked(tmp_path):
    save(tmp_path)
    with pytest.raises(ConversionError, match=r"iter_0000010: target must not exist yet. Choose another --save, or"):
        save(tmp_path)
    save(tmp_path, overwrite=True, args=toy_arguments(seed=7))
    assert open_checkpoint(tmp_path).args.seed == 7
    with pytest.raises(ConversionError, match="must not point to a training run's checkpoint yet, got '10'"):
        save(tmp_path, iteration=None)
    save(tmp_path, iteration=None, overwrite=True)
    assert open_checkpoint(tmp_path).directory.name == "release"


def test_the_tracker_points_to_the_latest_iteration(tmp_path):
    for iteration, latest in ((10, "10"), (5, "10"), (20, "20")):
        save(tmp_path, iteration=iteration)
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == latest


def test_objects_and_tensors_are_distinguished_as_megatron_does(tmp_path):
    save(tmp_path)
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "iter_0000010").read_metadata()
    entry = metadata.state_dict_metadata["a.bf16"]
    assert (entry.size, entry.properties.dtype) == (torch.Size([4, 3, 6]), torch.bfloat16)
    assert MetadataIndex("a._extra_state/shard_0_1") in metadata.storage_data
    assert MetadataIndex("a.bf16", torch.Size([2, 0, 3])) in metadata.storage_data
