"""`.metadata` is what pickle makes of torch's own records, and our reader brings the description back."""

import pickle

import pytest
import torch

from megatron_hammer.checkpoint_files.torch_dist.description import (
    Description,
    StoredChunk,
    StoredGlobal,
    StoredPlace,
    read_description,
)
from megatron_hammer.checkpoint_files.torch_dist.metadata_file import write_description


def describe(num_tensors: int, num_chunks: int, num_objects: int) -> Description:
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    tensors = {
        f"decoder.{number}.weight": StoredGlobal(
            shape=(3, 5 * num_chunks),
            dtype=dtypes[number % 3],
            chunks=tuple(StoredChunk((0, 5 * part), (3, 5)) for part in range(num_chunks)),
        )
        for number in range(num_tensors)
    }
    places = {
        (key, chunk.offsets): StoredPlace(name=f"__0_{key[8]}.distcp", offset=64 * n, length=1300, is_transformed=False)
        for key, stored in tensors.items()
        for n, chunk in enumerate(stored.chunks)
    }
    if num_tensors:
        tensors["scale"] = StoredGlobal(shape=(), dtype=torch.float32, chunks=(StoredChunk((), ()),))
        places["scale", ()] = StoredPlace(name="__0_1.distcp", offset=1 << 33, length=999, is_transformed=False)
    objects = tuple(f"core_attention._extra_state/shard_{number}_7" for number in range(num_objects))
    for key in objects:
        places[key, ()] = StoredPlace(name="__0_0.distcp", offset=70_000, length=8, is_transformed=False)
    return Description(tensors=tensors, objects=objects, places=places)


def pickle_with_torch(description: Description) -> bytes:
    from torch.distributed.checkpoint import filesystem, metadata

    entries = {
        key: metadata.TensorStorageMetadata(
            properties=metadata.TensorProperties(dtype=stored.dtype),
            size=torch.Size(stored.shape),
            chunks=[
                metadata.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in stored.chunks
            ],
        )
        for key, stored in description.tensors.items()
    }
    entries |= {key: metadata.BytesStorageMetadata() for key in description.objects}
    storage = {
        metadata.MetadataIndex(
            key, None if key in description.objects else torch.Size(offsets)
        ): filesystem._StorageInfo(place.name, place.offset, place.length)
        for (key, offsets), place in description.places.items()
    }
    return pickle.dumps(metadata.Metadata(state_dict_metadata=entries, storage_data=storage))


@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 1, 0), (3, 2, 2), (7, 60, 35)])
def test_the_bytes_are_those_of_torchs_records(tmp_path, sizes):
    description = describe(*sizes)
    write_description(tmp_path / ".metadata", description)
    assert (tmp_path / ".metadata").read_bytes() == pickle_with_torch(description)
    assert read_description(tmp_path / ".metadata") == description
