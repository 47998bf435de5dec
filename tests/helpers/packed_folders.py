"""A toy Hugging Face folder quantized by hand, to nearest, in GPTQ or AWQ format: packed number by number, slowly."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.gguf_models import write_gguf_source

GROUP_SIZE = 32
# AutoAWQ's order: the first output lies in the lowest 4 bits, the third in the next ones.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_small_source(folder: Path, **changes: object) -> Path:
    """Two blocks with sizes 96, 160, 192 and 64, all different and all multiples of 32."""
    return write_gguf_source(folder, **{"num_hidden_layers": 2, **changes})


def pack_folder(source: Path, target: Path, method: str, bits: int = 4) -> Path:
    """Quantize every linear layer of the blocks."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and tensor.ndim == 2:
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": value for part, value in pack_layer(tensor.float(), method, bits).items()}
        else:
            tensors[name] = tensor.to(torch.float16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": method, "bits": bits, "group_size": GROUP_SIZE, "version": "gemm"}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    for path in source.glob("tokenizer*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


def pack_layer(weight: Tensor, method: str, bits: int) -> dict[str, Tensor]:
    """weight [out, in] in groups of GROUP_SIZE inputs, each with a zero point."""
    num_outputs, num_inputs = weight.shape
    groups = weight.reshape(num_outputs, -1, GROUP_SIZE)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    q = (groups / scales.float()[..., None]).round() + zeros[..., None]
    numbers = q.clamp(0, 2**bits - 1).reshape(num_outputs, num_inputs).T.to(torch.int64).numpy()  # [in, out]
    zero_numbers = zeros.T.to(torch.int64).numpy()  # [groups, out]
    per_word = 32 // bits
    if method == "awq":
        packed = {"qweight": pack_rows(numbers, AWQ_ORDER, bits), "qzeros": pack_rows(zero_numbers, AWQ_ORDER, bits)}
    else:
        order = tuple(range(per_word))
        packed = {
            "qweight": pack_rows(numbers.T, order, bits).T.contiguous(),
            "qzeros": pack_rows(zero_numbers - 1, order, bits),
            "g_idx": torch.arange(num_inputs, dtype=torch.int32) // GROUP_SIZE,
        }
    return packed | {"scales": scales.T.contiguous()}


def pack_rows(numbers: np.ndarray, order: tuple[int, ...], bits: int) -> Tensor:
    """[rows, n] -> int32 [rows, n * bits / 32]; order: which of neighbouring numbers lies in which bits."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // len(order)), dtype=np.int64)
    for place, number in enumerate(order):
        words |= numbers[:, number :: len(order)] << (bits * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())
