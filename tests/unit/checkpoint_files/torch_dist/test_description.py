"""Hostile and damaged `.metadata` is one sentence; chunks tile their tensor."""

import itertools
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_hammer.checkpoint_files.torch_dist.description import find_overlap, read_description
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError
from tests.helpers.toy_checkpoint import write_toy_checkpoint

TENSOR = torch.arange(6.0 * 8).reshape(6, 8)


def change_metadata(target, change) -> None:
    metadata = pickle.loads((target / ".metadata").read_bytes())
    change(metadata)
    (target / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_chunk(offsets, sizes):
    def change(metadata):
        chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((3, 4)))
        chunk.offsets, chunk.sizes = offsets, sizes
        metadata.state_dict_metadata["key"].chunks[0] = chunk

    return change


def replace_place(**changes):
    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == "key")
        info = metadata.storage_data[index]
        values = {"relative_path": info.relative_path, "offset": info.offset, "length": info.length}
        metadata.storage_data[index] = _StorageInfo(**values | changes)

    return change


def replace_field(name, value):
    return lambda metadata: setattr(metadata, name, value)


HOSTILE = {
    "a folder above": (replace_place(relative_path="../other.distcp"), r"got the file '\.\./other\.distcp', which"),
    "an absolute path": (replace_place(relative_path="/etc/passwd"), "got the file '/etc/passwd', which is not a name"),
    "a path of another type": (replace_place(relative_path=7), "got a int in place of a name"),
    "a negative place": (replace_place(offset=-5), "got -5 in place of a size or an offset"),
    "a place that is no whole number": (replace_place(length=2.5), r"got 2\.5 in place of a size"),
    "a huge place": (replace_place(offset=10**30), "got 1000000000000000000000000000000 in place"),
    "a negative chunk": (replace_chunk((-3, 0), (3, 4)), "got -3 in place of a size or an offset"),
    "a chunk of fractions": (replace_chunk((0.0, 0), (3, 4)), r"got 0\.0 in place of a size or an offset"),
    "a chunk outside": (replace_chunk((0, 6), (3, 4)), r"key of shape \(6, 8\) with a chunk of \(3, 4\) at \(0, 6\)"),
    "a chunk of other axes": (replace_chunk((0,), (3,)), r"key of shape \(6, 8\) with a chunk of \(3,\) at"),
    "sizes of another type": (replace_chunk("00", (3, 4)), "got a str in place of sizes"),
    "no entries": (replace_field("state_dict_metadata", None), "'NoneType' object has no attribute 'items'"),
    "places in a list": (replace_field("storage_data", [3]), "'list' object has no attribute 'items'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_one_sentence(name, tmp_path):
    change, message = HOSTILE[name]
    target = write_toy_checkpoint(tmp_path, {"key": TENSOR})
    change_metadata(target, change)
    with pytest.raises(CheckpointError, match=rf"\.metadata: contents must be what torch.distributed.*{message}"):
        TorchDistStore(target)


def test_sizes_beyond_every_memory_are_refused(tmp_path):
    target = write_toy_checkpoint(tmp_path, {"key": TENSOR})
    change_metadata(target, lambda metadata: setattr(metadata.state_dict_metadata["key"], "size", (2**40, 2**40)))
    with pytest.raises(CheckpointError, match=r"key of shape \(1099511627776, 1099511627776\), which no memory holds"):
        read_description(target / ".metadata")


@pytest.mark.parametrize("content", [b"(" * 100_000, b"(l" * 50_000 + b".", b""], ids=["marks", "lists", "nothing"])
def test_nested_and_empty_metadata_is_one_sentence(content, tmp_path):
    target = write_toy_checkpoint(tmp_path, {"key": TENSOR})
    (target / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: contents must be what"):
        TorchDistStore(target)


def test_nested_json_is_one_sentence(tmp_path):
    target = write_toy_checkpoint(tmp_path, {"key": TENSOR})
    (target / "metadata.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"metadata\.json: must name the sharded_backend"):
        TorchDistStore(target)


def test_a_chunk_listed_twice_while_another_is_missing_is_named(tmp_path):
    """The number of elements is right, and a quarter of them would be what the memory held before."""

    def repeat(metadata):
        chunks = metadata.state_dict_metadata["key"].chunks
        chunks[3] = chunks[0]

    target = write_toy_checkpoint(tmp_path, {"key": TENSOR})
    change_metadata(target, repeat)
    with pytest.raises(CheckpointError, match=r"chunks of key must not overlap, got those at \(0, 0\) and at \(0, 0\)"):
        TorchDistStore(target).validate()


def test_a_place_of_another_chunk_is_no_place_of_this_one(tmp_path):
    target = write_toy_checkpoint(tmp_path, {"key": TENSOR})

    def move(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == "key")
        metadata.storage_data[MetadataIndex("key", torch.Size((1, 1)))] = metadata.storage_data.pop(index)

    change_metadata(target, move)
    with pytest.raises(CheckpointError, match="key must have 48 elements in its chunks, got 36"):
        TorchDistStore(target).validate()


def grid(*cuts):
    """Boxes of every combination of the ranges between neighbouring cuts of each axis."""
    ranges = [list(itertools.pairwise(axis)) for axis in cuts]
    return [
        (tuple(first for first, _ in cell), tuple(last - first for first, last in cell))
        for cell in itertools.product(*ranges)
    ]


PINWHEEL = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


@pytest.mark.parametrize(
    "boxes",
    [
        *([], [((), ())], grid((0, 3)), grid((0, 3, 4, 9), (0, 5, 6), (0, 2))),
        # rows of different widths; no straight cut goes through the last
        *([((0, 0), (1, 5)), ((1, 0), (2, 3)), ((1, 3), (2, 2))], PINWHEEL),
        [((0, 0), (0, 5)), ((0, 0), (3, 5))],  # nothing, beside everything
    ],
)
def test_boxes_that_tile_have_no_overlap(boxes):
    assert find_overlap(boxes) is None


@pytest.mark.parametrize("boxes", [grid((0, 3, 4, 9), (0, 5, 6)), PINWHEEL])
def test_a_box_that_grows_or_comes_twice_overlaps(boxes):
    for number, (offsets, sizes) in enumerate(boxes):
        assert find_overlap([*boxes, (offsets, sizes)]) is not None
        others = [box for index, box in enumerate(boxes) if index != number]
        grown = (tuple(max(0, first - 1) for first in offsets), tuple(size + 1 for size in sizes))
        assert find_overlap([*others, grown]) is not None
