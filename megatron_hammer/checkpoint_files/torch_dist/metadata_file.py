"""Writes `.metadata`, byte for byte what pickle makes of torch.distributed.checkpoint's own records.

The records are named and not imported: the import takes as long as half of torch. The inverse is
`description.read_description`.
"""

import io
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.checkpoint_files.pickle_reader import MegatronObject
from megatron_hammer.checkpoint_files.pickle_writer import StandInPickler
from megatron_hammer.checkpoint_files.torch_dist.description import Description, StoredGlobal

_PROTOCOL = 4  # pickle's default, which torch.distributed.checkpoint uses


def write_description(path: Path, description: Description) -> None:
    """Write the file; both mappings keep their order. Raises OSError."""
    file = io.BytesIO()
    StandInPickler(file, protocol=_PROTOCOL).dump(_build_metadata(description))
    path.write_bytes(file.getvalue())


def _stand_in(module: str, name: str) -> Any:
    return type(name, (MegatronObject,), {"global_name": f"torch.distributed.checkpoint.{module}.{name}"})


_StorageInfo = _stand_in("filesystem", "_StorageInfo")
_BytesStorageMetadata = _stand_in("metadata", "BytesStorageMetadata")
_ChunkStorageMetadata = _stand_in("metadata", "ChunkStorageMetadata")
_Metadata = _stand_in("metadata", "Metadata")
_MetadataIndex = _stand_in("metadata", "MetadataIndex")
_TensorProperties = _stand_in("metadata", "TensorProperties")
_TensorStorageMetadata = _stand_in("metadata", "TensorStorageMetadata")
_CONTIGUOUS = _stand_in("metadata", "_MEM_FORMAT_ENCODING")(0)  # TORCH_CONTIGUOUS_FORMAT


def _build_metadata(description: Description) -> Any:
    entries = {key: _describe(stored) for key, stored in description.tensors.items()}
    entries |= {key: _make(_BytesStorageMetadata, None) for key in description.objects}
    objects, places = set(description.objects), {}
    for (key, offsets), place in description.places.items():
        # The fields of a record are in the order in which its class sets them; that of an object has no offset.
        index = {"fqn": key, "index": None} | ({} if key in objects else {"offset": torch.Size(offsets)})
        info = {"relative_path": place.name, "offset": place.offset, "length": place.length}
        places[_make(_MetadataIndex, index)] = _make(_StorageInfo, info)
    fields = ("planner_data", "storage_data", "storage_meta", "version")
    unset = dict.fromkeys(fields)
    return _make(_Metadata, {"state_dict_metadata": entries, **unset, "storage_data": places})


def _describe(stored: StoredGlobal) -> Any:
    # dtype, layout, requires_grad, memory format, pin_memory, strides: TensorProperties.__getstate__.
    properties = _make(_TensorProperties, (stored.dtype, torch.strided, False, _CONTIGUOUS, False, None))
    chunks = [
        _make(_ChunkStorageMetadata, {"offsets": torch.Size(chunk.offsets), "sizes": torch.Size(chunk.sizes)})
        for chunk in stored.chunks
    ]
    return _make(_TensorStorageMetadata, {"properties": properties, "size": torch.Size(stored.shape), "chunks": chunks})


def _make(kind: Any, state: Any) -> Any:
    """A record as its class would leave it for pickle: made empty, then given its fields."""
    record = kind.__new__(kind)
    record.state = state
    return record
