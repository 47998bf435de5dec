"""Which tensor gets which type, and what its bytes are."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import dequantize

from megatron_hammer.checkpoint.gguf import file_types as gguf_types
from megatron_hammer.checkpoint.gguf.file_types import (
    FILE_TYPES,
    Place,
    count_tensor_bytes,
    decode_rows,
    encode_rows,
    load_quantizer,
    select_type,
)
from megatron_hammer.errors import PlatformError

ROW = (7, 512)


def place(
    kind: str, layer: int = 0, *, num_layers: int = 22, heads_per_group: int = 8, is_output: bool = False
) -> Place:
    return Place(kind=kind, layer=layer, num_layers=num_layers, heads_per_group=heads_per_group, is_output=is_output)


def layers_of(name: str, kind: str, wanted: Type) -> list[int]:
    return [layer for layer in range(22) if select_type(FILE_TYPES[name], place(kind, layer), ROW) is wanted]


@pytest.mark.parametrize("name", FILE_TYPES)
def test_vectors_are_f32_in_every_file(name):
    assert select_type(FILE_TYPES[name], place("attn_norm"), (512,)) is Type.F32


def test_a_mixture_gives_more_bits_where_llama_cpp_does():
    assert layers_of("q4_k_m", "ffn_down", Type.Q6_K) == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]
    assert layers_of("q4_k_s", "attn_v", Type.Q5_K) == [0, 1, 2, 3]
    assert layers_of("q4_k_s", "ffn_down", Type.Q5_K) == [0, 1]
    assert layers_of("q3_k_m", "ffn_down", Type.Q5_K) == [0]
    assert layers_of("q4_k_m", "ffn_up", Type.Q4_K) == list(range(22))
    assert select_type(FILE_TYPES["q2_k"], place("attn_v", heads_per_group=2), ROW) is Type.Q3_K
    assert select_type(FILE_TYPES["q2_k"], place("attn_v", heads_per_group=4), ROW) is Type.Q4_K
    assert select_type(FILE_TYPES["q3_k_s"], place("attn_v", num_layers=80), ROW) is Type.Q5_K


def test_a_fused_qkv_gets_the_bits_that_llama_cpp_gives_it():
    expected = {"q2_k": Type.Q2_K, "q3_k_s": Type.Q3_K, "q3_k_m": Type.Q4_K, "q3_k_l": Type.Q4_K}
    expected |= {"q4_k_s": Type.Q4_K, "q4_k_m": Type.Q5_K, "q5_k_s": Type.Q5_K, "q5_k_m": Type.Q6_K}
    chosen = {name: select_type(FILE_TYPES[name], place("attn_qkv"), ROW) for name in expected}
    assert chosen == expected


def test_the_head_gets_more_bits():
    head = place("output", is_output=True)
    assert select_type(FILE_TYPES["q2_k"], head, ROW) is Type.Q6_K
    assert select_type(FILE_TYPES["q2_k"], head, (7, 288)) is Type.Q8_0
    assert select_type(FILE_TYPES["q8_0"], head, ROW) is Type.Q8_0
    assert select_type(FILE_TYPES["q2_k"], place("token_embd"), ROW) is Type.Q2_K


@pytest.mark.parametrize(
    "name, row_size, expected",
    [
        ("q8_0", 48, Type.F16),
        ("q2_k", 288, Type.Q4_0),
        ("q4_k_s", 288, Type.Q5_0),
        ("q5_k_s", 288, Type.Q5_1),
        ("q6_k", 288, Type.Q8_0),
        ("q6_k", 48, Type.F16),
        ("bf16", 7, Type.BF16),
    ],
)
def test_rows_that_are_not_whole_blocks_fall_back(name, row_size, expected):
    assert select_type(FILE_TYPES[name], place("ffn_up"), (3, row_size)) is expected


@pytest.mark.parametrize(
    "kind, dtype", [(Type.F32, torch.float32), (Type.F16, torch.float16), (Type.BF16, torch.bfloat16)]
)
def test_floats_are_rounded_once(kind, dtype):
    rows = torch.randn(3, 7)
    encoded = bytes(encode_rows(rows, kind))
    assert encoded == rows.to(dtype).view(torch.uint8).numpy().tobytes()
    assert len(encoded) == count_tensor_bytes((3, 7), kind)


def test_q8_0_is_near_its_source():
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    encoded = np.frombuffer(encode_rows(rows, Type.Q8_0), np.uint8).reshape(5, -1)
    assert encoded.nbytes == count_tensor_bytes((5, 64), Type.Q8_0)
    step = rows.float().abs().reshape(5, 2, 32).amax(-1, keepdim=True) / 127
    error = (decode_rows(encoded, Type.Q8_0) - rows).abs().reshape(5, 2, 32)
    assert (error <= step * 0.57).all()  # half a step, and 127 of them by a scale rounded to f16
    assert (error > step * 0.4).any()
    assert torch.equal(torch.from_numpy(dequantize(encoded, Type.Q8_0)), decode_rows(encoded, Type.Q8_0))


def test_k_quants_need_llama_cpp(monkeypatch):
    load_quantizer.cache_clear()
    monkeypatch.setattr(gguf_types.ctypes, "CDLL", lambda path: object())
    monkeypatch.setitem(
        __import__("sys").modules, "xllamacpp", __import__("types").SimpleNamespace(xllamacpp=gguf_types)
    )
    with pytest.raises(
        PlatformError,
        match=r"^k-quants: llama.cpp must make them, got AttributeError: .*ggml_quantize_chunk'.*--type q8_0\b",
    ):
        load_quantizer()
    load_quantizer.cache_clear()
