"""A saved tensor is mapped in its file; anything unusual is left to torch.load, and no pickle is trusted."""

import io
import os
import zipfile
from io import FileIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.torch_dist import saved_tensor as mapped_tensor
from megatron_hammer.checkpoint_files.torch_dist.saved_tensor import find_saved_tensor, map_tensor, read_into

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def write_saved(path: Path, value: object, *, before: int = 0, after: bytes = b"more") -> tuple[int, int]:
    """Write `before` bytes, then what torch.save makes; returns its offset and length."""
    saved = io.BytesIO()
    torch.save(value, saved)
    path.write_bytes(b"\x07" * before + saved.getvalue() + after)
    return before, saved.tell()


def find(path: Path, offset: int, length: int, tensor: Tensor) -> int | None:
    with FileIO(path) as file:
        return find_saved_tensor(file, offset=offset, length=length, shape=tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [0, 1, 6, 4096, 4099, 70_000])
def test_the_elements_are_found_at_any_offset(tmp_path, dtype, before):
    tensor = (torch.randn(5, 3, 7) * 9).to(dtype)
    offset, length = write_saved(tmp_path / "file", tensor, before=before)
    start = find(tmp_path / "file", offset, length, tensor)
    assert start is not None
    with FileIO(tmp_path / "file") as file:
        mapped = map_tensor(file, start, tensor.shape, dtype)
        filled = torch.empty_like(tensor)
        read_into(file, start, filled)
    assert torch.equal(mapped, tensor)
    assert torch.equal(filled, tensor)
    assert mapped.data_ptr() % dtype.itemsize == 0


def test_an_aligned_tensor_is_a_view_whose_changes_are_private(tmp_path, monkeypatch):
    monkeypatch.delattr(mapped_tensor, "read_into")  # nothing may be read into memory
    tensor = torch.randn(6, 10)
    offset, length = write_saved(tmp_path / "file", tensor, before=8)
    start = find(tmp_path / "file", offset, length, tensor)
    assert start is not None
    assert start % 4 == 0
    before = (tmp_path / "file").read_bytes()
    with FileIO(tmp_path / "file") as file:
        first, second = (map_tensor(file, start, tensor.shape, tensor.dtype) for _ in range(2))
    first.zero_()
    assert torch.equal(second, tensor)
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(24.0)[12:].reshape(4, 3),
        torch.nn.Parameter(torch.zeros(4, 3)),
        torch.zeros(4, 3).double(),
        torch.zeros(3, 4),
        [torch.zeros(4, 3)],
        {"a": 1},
    ],
    ids=["strided", "offset", "parameter", "other dtype", "other shape", "list", "no tensor"],
)
def test_a_tensor_that_is_not_plain_is_not_located(tmp_path, value):
    offset, length = write_saved(tmp_path / "file", value)
    assert find(tmp_path / "file", offset, length, torch.zeros(4, 3)) is None


def rewrite(path: Path, **changes: bytes | int) -> int:
    """The saved file with members replaced (bytes) or compressed (an int); returns its length."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            change = changes.get(name.partition("/")[2].replace("/", "_").replace(".", "_"))
            method = change if isinstance(change, int) else zipfile.ZIP_STORED
            target.writestr(name, change if isinstance(change, bytes) else data, compress_type=method)
    return path.stat().st_size


def test_a_rewritten_file_is_found_unless_it_is_compressed_short_or_of_another_byte_order(tmp_path):
    tensor, path = torch.randn(4, 3), tmp_path / "file"
    for changes, is_found in (
        ({}, True),
        ({"data_0": zipfile.ZIP_DEFLATED}, False),
        ({"data_0": b"short"}, False),
        ({"byteorder": b"big"}, False),
        ({"data_pkl": b"\x80\x02garbage"}, False),
    ):
        torch.save(tensor, path)
        length = rewrite(path, **changes)
        assert (find(path, 0, length, tensor) is not None) == is_found, changes


def test_a_truncated_file_is_not_found_and_not_read(tmp_path):
    tensor = torch.randn(50, 3)
    offset, length = write_saved(tmp_path / "file", tensor, after=b"")
    start = find(tmp_path / "file", offset, length, tensor)
    assert start is not None
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[: start + 500])
    assert find(tmp_path / "file", offset, length, tensor) is None
    with FileIO(tmp_path / "file") as file, pytest.raises(EOFError, match="100 bytes are missing"):
        read_into(file, start, torch.empty(50, 3))


class RunsACommand:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_cannot_run_a_command(tmp_path):
    offset, length = write_saved(tmp_path / "file", RunsACommand(tmp_path / "ran"))
    assert find(tmp_path / "file", offset, length, torch.zeros(1)) is None
    assert not (tmp_path / "ran").exists()
    torch.serialization.load(tmp_path / "file", weights_only=False)  # the twin: there it does
    assert (tmp_path / "ran").exists()
