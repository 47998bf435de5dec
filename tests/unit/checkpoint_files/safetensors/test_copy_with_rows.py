"""A file is copied with rows added: safetensors reads it, and every other byte is unchanged."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_hammer.checkpoint_files.safetensors import copy_with_rows as safetensors_copy
from megatron_hammer.checkpoint_files.safetensors.copy_with_rows import (
    InsertedRows,
    copy_with_rows,
    list_different_tensors,
)
from megatron_hammer.checkpoint_files.safetensors.header import read_header
from megatron_hammer.errors import ConversionError

TENSORS = {
    "b": torch.randn(7, 3, dtype=torch.bfloat16),
    "a": torch.randn(5, 4),
    "c": torch.arange(11),
    "empty": torch.empty(0, 2),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture(params=[16, 1 << 24], ids=["small chunks", "large chunks"])
def source(tmp_path, request, monkeypatch):
    monkeypatch.setattr(safetensors_copy, "CHUNK_BYTES", request.param)
    save_file(TENSORS, tmp_path / "source.safetensors", metadata={"format": "pt", "字": "x"})
    return tmp_path / "source.safetensors"


def rows_of(tensor, first_row):
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    return InsertedRows(first_row=first_row, num_rows=len(tensor), data=data)


def test_rows_are_appended_and_put_over_padding(source, tmp_path):
    new_b, new_a = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(2, 4)
    inserted = {"b": rows_of(new_b, 5), "a": rows_of(new_a, 1)}
    copy_with_rows(source, tmp_path / "target", inserted)
    written = load_file(tmp_path / "target")
    assert torch.equal(written["b"], torch.cat([TENSORS["b"][:5], new_b]))
    assert torch.equal(written["a"], torch.cat([TENSORS["a"][:1], new_a, TENSORS["a"][3:]]))
    for name in ("c", "empty", "scalar"):
        assert torch.equal(written[name], TENSORS[name])
    assert list_different_tensors(source, tmp_path / "target", inserted) == []
    with safe_open(tmp_path / "target", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "字": "x"}


def test_without_rows_the_data_is_the_same(source, tmp_path):
    copy_with_rows(source, tmp_path / "target", {})
    assert (tmp_path / "target").read_bytes()[-64:] == source.read_bytes()[-64:]
    assert load_file(tmp_path / "target").keys() == TENSORS.keys()


def test_twin_a_changed_byte_is_noticed(source, tmp_path):
    inserted = {"b": rows_of(torch.randn(4, 3, dtype=torch.bfloat16), 7)}
    copy_with_rows(source, tmp_path / "target", inserted)
    for name, tensor in read_header(tmp_path / "target")[0].items():
        if not tensor.num_bytes:
            continue
        content = bytearray((tmp_path / "target").read_bytes())
        content[tensor.start + tensor.num_bytes - 1] ^= 1
        (tmp_path / "changed").write_bytes(content)
        assert list_different_tensors(source, tmp_path / "changed", inserted) == [name]
    assert list_different_tensors(source, tmp_path / "target", {}) == ["b"]
    save_file({"a": TENSORS["a"]}, tmp_path / "other")
    assert list_different_tensors(source, tmp_path / "other", {}) == ["b", "c", "empty", "scalar"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[:-1], r"must be complete safetensors, got [\d,]+ bytes where its header says"),
        (lambda content: content + b"x", r"must be complete safetensors, got [\d,]+ bytes where its header says"),
        (lambda content: content[:40], "must be complete safetensors, got "),
        (lambda content: b"", "must be complete safetensors, got "),
        (lambda content: b"\xff" * 90, "got a header beyond safetensors' limit"),
        (lambda content: struct.pack("<Q", 2) + b"[]", "must be complete safetensors, got "),
    ],
)
def test_a_damaged_file_is_named(source, damage, message):
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(ConversionError, match=f"source.safetensors: file {message}|{message}"):
        read_header(source)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"none: weights cannot be read \(No such file"):
        read_header(tmp_path / "none")


def test_tensors_are_read_in_the_order_of_their_bytes(tmp_path):
    header = {
        "late": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "early": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    encoded = json.dumps(header).encode()
    (tmp_path / "s").write_bytes(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<2f", 1.0, 2.0))
    copy_with_rows(tmp_path / "s", tmp_path / "t", {"early": rows_of(torch.tensor([[9.0]]), 1)})
    written = load_file(tmp_path / "t")
    assert (written["early"].tolist(), written["late"].tolist()) == ([1.0, 9.0], [2.0])
