"""Which type every tensor of a GGUF file gets, and the bytes of its rows in that type.

f32, f16, bf16 and q8_0 are written with the `gguf` package. The k-quants are made by llama.cpp itself: the wheel of
xllamacpp has no Python function for it and leaves llama_model_quantize out, but its library exports
ggml_quantize_chunk, which quantizes rows. Which tensor of a mixture takes which type is then ours to say: the rules
are those of llama.cpp's llama_tensor_get_type_impl for dense models without an importance matrix, as are the types
that a tensor falls back to where its rows are not whole blocks.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf import quants as gguf_quants
from torch import Tensor

from megatron_hammer.errors import ConversionError, PlatformError

Type = GGMLQuantizationType

FLOAT_DTYPES = MappingProxyType({Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16})
TYPES_OF_THE_PACKAGE = (*FLOAT_DTYPES, Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q5_1)
# Where rows are not whole blocks. Source: llama.cpp, tensor_type_fallback; q8_0 -> f16 is its converter's.
FALLBACKS = MappingProxyType(
    {
        Type.Q2_K: Type.Q4_0,
        Type.Q3_K: Type.Q4_0,
        Type.Q4_K: Type.Q5_0,
        Type.Q5_K: Type.Q5_1,
        Type.Q6_K: Type.Q8_0,
    }
)
NUM_LAYERS_OF_70B = 80  # llama.cpp's LLM_TYPE_70B, where 8 heads share one attn_v


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor stands in the model. kind: "attn_v", "ffn_down", "output", ... of its GGUF name."""

    kind: str
    layer: int
    num_layers: int
    heads_per_group: int
    is_output: bool  # the head, or the embedding where it serves as one


@dataclass(frozen=True, kw_only=True, slots=True)
class FileType:
    """A name that a user asks for. exceptions: what some tensors get instead of `default`, or None."""

    code: LlamaFileType
    default: GGMLQuantizationType
    exceptions: Callable[[Place], GGMLQuantizationType | None] = lambda place: None

    @property
    def needs_llama_cpp(self) -> bool:
        return self.default not in TYPES_OF_THE_PACKAGE


def _has_more_bits(place: Place) -> bool:
    """The first and last eighth of the layers and every third between. Source: llama.cpp, use_more_bits."""
    layer, eighth = place.layer, place.num_layers // 8
    return layer < eighth or layer >= 7 * place.num_layers // 8 or (layer - eighth) % 3 == 2


# Source of the mixtures below: llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp, without its branches for
# experts, Falcon and files with an importance matrix.
def _q2_k(place: Place) -> GGMLQuantizationType | None:
    # Where 4 or more query heads share one value head, attn_v is small, so a better type hardly enlarges the file.
    value = Type.Q4_K if place.heads_per_group >= 4 else Type.Q3_K
    return {"attn_v": value, "ffn_down": Type.Q3_K, "attn_output": Type.Q3_K}.get(place.kind)


def _q3_k_m(place: Place) -> GGMLQuantizationType | None:
    value = Type.Q5_K if place.layer < 2 else Type.Q4_K
    # Integer division as in llama.cpp: a model with fewer than 16 layers has no Q5_K here.
    down = Type.Q5_K if place.layer < place.num_layers // 16 else Type.Q4_K
    return {"attn_v": value, "attn_qkv": Type.Q4_K, "ffn_down": down, "attn_output": Type.Q4_K}.get(place.kind)


def _q3_k_l(place: Place) -> GGMLQuantizationType | None:
    if place.kind == "attn_qkv":
        return Type.Q4_K
    return Type.Q5_K if place.kind in ("attn_v", "ffn_down", "attn_output") else None


def _q4_k_s(place: Place) -> GGMLQuantizationType | None:
    is_early = {"attn_v": place.layer < 4, "ffn_down": place.layer < place.num_layers // 8}
    return Type.Q5_K if is_early.get(place.kind) else None


def _q4_k_m(place: Place) -> GGMLQuantizationType | None:
    return Type.Q5_K if place.kind == "attn_qkv" else _q5_k_m(place)


def _q5_k_m(place: Place) -> GGMLQuantizationType | None:
    is_chosen = place.kind in ("attn_v", "ffn_down") and _has_more_bits(place)
    return Type.Q6_K if is_chosen or place.kind == "attn_qkv" else None


_CODE = LlamaFileType
FILE_TYPES = MappingProxyType(
    {
        "f32": FileType(code=_CODE.ALL_F32, default=Type.F32),
        "f16": FileType(code=_CODE.MOSTLY_F16, default=Type.F16),
        "bf16": FileType(code=_CODE.MOSTLY_BF16, default=Type.BF16),
        "q8_0": FileType(code=_CODE.MOSTLY_Q8_0, default=Type.Q8_0),
        "q2_k": FileType(code=_CODE.MOSTLY_Q2_K, default=Type.Q2_K, exceptions=_q2_k),
        "q3_k_s": FileType(code=_CODE.MOSTLY_Q3_K_S, default=Type.Q3_K),
        "q3_k_m": FileType(code=_CODE.MOSTLY_Q3_K_M, default=Type.Q3_K, exceptions=_q3_k_m),
        "q3_k_l": FileType(code=_CODE.MOSTLY_Q3_K_L, default=Type.Q3_K, exceptions=_q3_k_l),
        "q4_k_s": FileType(code=_CODE.MOSTLY_Q4_K_S, default=Type.Q4_K, exceptions=_q4_k_s),
        "q4_k_m": FileType(code=_CODE.MOSTLY_Q4_K_M, default=Type.Q4_K, exceptions=_q4_k_m),
        "q5_k_s": FileType(code=_CODE.MOSTLY_Q5_K_S, default=Type.Q5_K),
        "q5_k_m": FileType(code=_CODE.MOSTLY_Q5_K_M, default=Type.Q5_K, exceptions=_q5_k_m),
        "q6_k": FileType(code=_CODE.MOSTLY_Q6_K, default=Type.Q6_K),
    }
)


def select_type(file_type: FileType, place: Place, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The type of one tensor. Vectors (norms, biases) are f32 in every file, as in llama.cpp's own."""
    if len(shape) < 2:
        return Type.F32
    if file_type.default in FLOAT_DTYPES:
        return file_type.default
    return _fit_blocks(_select_quantized(file_type, place, shape[-1]), shape[-1])


def _select_quantized(file_type: FileType, place: Place, row_size: int) -> GGMLQuantizationType:
    default = file_type.default
    # Source: the branch for the output tensor, which a tied embedding takes too, because it is also the head.
    if place.is_output:
        has_blocks = row_size % GGML_QUANT_SIZES[default][0] == 0
        return Type.Q6_K if has_blocks and default is not Type.Q8_0 else Type.Q8_0
    selected = file_type.exceptions(place) or default
    # Source: the branch for LLM_TYPE_70B. There attn_v is 1/8 of attn_q, so more bits hardly enlarge the file.
    is_70b = place.num_layers == NUM_LAYERS_OF_70B and place.heads_per_group > 1
    if is_70b and place.kind == "attn_v" and selected in (Type.Q3_K, Type.Q4_K):
        return Type.Q5_K
    return selected


def _fit_blocks(selected: GGMLQuantizationType, row_size: int) -> GGMLQuantizationType:
    for candidate in (selected, FALLBACKS.get(selected, Type.F16)):
        if row_size % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Type.F16


def count_tensor_bytes(shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> int:
    """Bytes of a tensor's data, without padding."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    return torch.Size(shape).numel() // block_size * block_bytes


def encode_rows(rows: Tensor, tensor_type: GGMLQuantizationType) -> memoryview:
    """The bytes of finite rows [r, c] (or a vector) in `tensor_type`; c is whole blocks of it."""
    if tensor_type in FLOAT_DTYPES:
        converted = rows.to(FLOAT_DTYPES[tensor_type]).contiguous()
        # numpy has no bfloat16, so the bytes leave torch as uint8.
        return memoryview(converted.reshape(-1).view(torch.uint8).numpy())
    values = rows.float().contiguous().numpy()
    if tensor_type in TYPES_OF_THE_PACKAGE:
        return memoryview(np.ascontiguousarray(gguf_quants.quantize(values, tensor_type)).reshape(-1).view(np.uint8))
    return memoryview(_quantize_with_llama_cpp(values, tensor_type))


def decode_rows(data: np.ndarray, tensor_type: GGMLQuantizationType) -> Tensor:
    """The f32 values [r, c] of quantized rows [r, bytes]."""
    return torch.from_numpy(np.ascontiguousarray(gguf_quants.dequantize(data, tensor_type)))


def _quantize_with_llama_cpp(values: np.ndarray, tensor_type: GGMLQuantizationType) -> np.ndarray:
    num_rows, row_size = values.shape
    encoded = np.empty(count_tensor_bytes(values.shape, tensor_type), np.uint8)
    # 0 and None: start with the first row, and weigh all values alike (no importance matrix).
    written_bytes = load_quantizer()(
        int(tensor_type), values.ctypes.data, encoded.ctypes.data, 0, num_rows, row_size, None
    )
    if written_bytes != encoded.nbytes:
        raise ConversionError(
            f"{tensor_type.name}: llama.cpp must write {encoded.nbytes} bytes, got {written_bytes}. "
            "Its blocks are not those of the gguf package; install the versions in constraints.txt."
        )
    return encoded


@functools.cache
def load_quantizer() -> Callable[..., int]:
    """llama.cpp's ggml_quantize_chunk(type, source, target, start, rows, row_size, importance) -> bytes written.

    Raises PlatformError where xllamacpp is not installed or its library keeps the function to itself.
    """
    try:
        from xllamacpp import xllamacpp

        function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        raise PlatformError(
            f"k-quants: llama.cpp must make them, got {type(error).__name__}: {error}. "
            "Install xllamacpp, or pass --type q8_0."
        ) from error
    # Without these, ctypes would pass and return 32-bit integers, and large tensors would overflow them.
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
