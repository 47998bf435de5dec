"""What is written reads back; NaN, overflow, a flipped bit and rows in a wrong order do not pass."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter

from megatron_hammer.checkpoint.gguf.file_types import encode_rows
from megatron_hammer.checkpoint.gguf.gguf_file import (
    MAX_RELATIVE_ERROR,
    ExtraTensor,
    measure_relative_error,
    verify_gguf,
    write_gguf,
)
from megatron_hammer.checkpoint.gguf.tensors import GgufTensor
from megatron_hammer.checkpoint.hugging_face.rotary_rows import permute_rope
from megatron_hammer.errors import ConversionError
from tests.helpers.messages import assert_problems, raises_problem

EXTRA = ExtraTensor(name="extra.weight", values=torch.tensor([1.0, 2.5, 4.0]))


def ignore(done: int) -> None:
    assert done > 0


def sources(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"q": (24, 64), "up": (40, 64), "norm": (64,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def plan(kind: Type) -> list[GgufTensor]:
    return [
        GgufTensor(name="blk.0.attn_q.weight", hf_name="q", shape=(24, 64), type=kind, rope_heads=3),
        GgufTensor(name="blk.0.ffn_up.weight", hf_name="up", shape=(40, 64), type=kind),
        GgufTensor(name="output_norm.weight", hf_name="norm", shape=(64,), type=Type.F32),
    ]


def write(path, tensors, source):
    write_gguf(path, GGUFWriter(None, "llama"), [EXTRA], tensors, source.__getitem__, ignore)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0])
def test_there_and_back(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("megatron_hammer.checkpoint.gguf.gguf_file.BLOCK_BYTES", 4 * 64 * 7)  # blocks of 7 rows
    path, source = tmp_path / "model.gguf", sources()
    write(path, plan(kind), source)
    verify_gguf(path, [EXTRA], plan(kind), source.__getitem__, ignore)
    stored = {entry.name: entry for entry in GGUFReader(path).tensors}
    assert [*stored] == ["extra.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output_norm.weight"]
    assert {entry.tensor_type for entry in stored.values()} == {kind, Type.F32}
    assert np.array_equal(stored["extra.weight"].data, [1.0, 2.5, 4.0])
    if kind is Type.F32:
        expected = permute_rope(source["q"].float(), num_heads=3)
        assert np.array_equal(stored["blk.0.attn_q.weight"].data, expected.numpy())


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0])
def test_twin_rows_of_another_order_are_noticed(tmp_path, kind):
    path, source = tmp_path / "model.gguf", sources()
    tensors = plan(kind)
    unpermuted = [GgufTensor(name=one.name, hf_name=one.hf_name, shape=one.shape, type=one.type) for one in tensors]
    write(path, unpermuted, source)
    with pytest.raises(
        ConversionError, match=r"blk\.0\.attn_q\.weight must read back as it was written, got a difference\."
    ):
        verify_gguf(path, [EXTRA], tensors, source.__getitem__, ignore)


def test_twin_a_flipped_bit_is_noticed(tmp_path):
    path, source = tmp_path / "model.gguf", sources()
    write(path, plan(Type.F16), source)
    data = bytearray(path.read_bytes())
    data[-4 * 64 - 100] ^= 1  # in blk.0.ffn_up.weight
    path.write_bytes(data)
    with raises_problem(ConversionError, f"{path}: blk.0.ffn_up.weight", "read back", "got a difference", "disk"):
        verify_gguf(path, [EXTRA], plan(Type.F16), source.__getitem__, ignore)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Type.BF16, Type.Q8_0])
def test_every_tensor_with_nan_is_named(tmp_path, kind):
    source = sources()
    source["q"][3, 5] = float("nan")
    source["norm"][1] = float("inf")
    with pytest.raises(ConversionError) as caught:
        write(tmp_path / "model.gguf", plan(kind), source)
    assert_problems(
        caught.value.problems,
        ("q:", "weights must be finite", "got NaN or infinity"),
        ("norm:", "weights must be finite", "got NaN or infinity"),
    )


def test_values_beyond_f16_are_named(tmp_path):
    source = sources(torch.float32)
    source["up"][0, 0] = 70_000.0
    with pytest.raises(
        ConversionError,
        match=r"^up: weights must be finite in f16, got NaN or infinity.*--type bf16\b",
    ):
        write(tmp_path / "model.gguf", plan(Type.F16), source)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q5_1])
def test_the_largest_error_is_between_that_of_the_type_and_that_of_a_wrong_order(kind):
    tensor = GgufTensor(name="x", hf_name="x", shape=(64, 256), type=kind)
    source = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    data = np.frombuffer(encode_rows(source, kind), np.uint8).reshape(64, -1)
    error = measure_relative_error(data, tensor, source)
    assert MAX_RELATIVE_ERROR[kind] / 4 < error < MAX_RELATIVE_ERROR[kind] / 2
    assert measure_relative_error(data, tensor, source.flip(0)) > 1.3
