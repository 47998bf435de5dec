"""Reads the packed layers of a GPTQ or AWQ folder back into plain weights, without the package that wrote them.

Kernels for these formats need a GPU or packages that many machines lack. This reading needs neither: it checks what was
packed, and it gives a model that computes what a kernel computes, up to the kernel's rounding.

A layer of shape [out, in] with groups of g inputs is stored as qweight, qzeros, scales and a bias; b bits per weight:
    weight[o, i] = scales[group(i), o] * (q[i, o] - zero[group(i), o])
GPTQ: qweight [in * b / 32, out] holds 32 / b consecutive inputs in an int32, the first in its lowest bits; qzeros
[in / g, out * b / 32] holds zero - 1 in the same way along the outputs; g_idx [in] is the group of each input.
AWQ (version "gemm", 4 bits): qweight [in, out / 8] and qzeros [in / g, out / 8] hold eight outputs in the order
0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits, and zero itself.
Sources: AutoGPTQ's qlinear_cuda_old.py and AutoAWQ's packing_utils.py; tests compare with what AutoRound computes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, read_config
from megatron_hammer.checkpoint_files.safetensors.shard_writer import ShardWriter, plan_shards
from megatron_hammer.checkpoint_files.safetensors.weight_files import HfWeights, open_hf_weights
from megatron_hammer.errors import ConversionError

PACKED_ENDINGS = ("qweight", "qzeros", "scales", "g_idx")
PLAIN_SHARD_BYTES = 2_000_000_000
_WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf", ".py")
_WRITTEN_ANEW = (CONFIG_NAME, "README.md", "quantization_config.json", "quantize_config.json")
# Where the lowest bits of output 0, 1, ... lie in the int32.
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def list_packed_layers(weights: HfWeights) -> list[str]:
    """The names of the layers that are packed, such as model.layers.0.mlp.up_proj."""
    return [name.removesuffix(".qweight") for name in weights.shapes if name.endswith(".qweight")]


def read_packed_layer(weights: HfWeights, layer: str, quantization: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The weight of a packed layer, and the signed step of the quantization at each weight: both [out, in], fp32.

    quantization: quantization_config of config.json. Raises ConversionError if a part of the layer is missing.
    """
    _require_parts(weights, layer)
    q, zeros, scales = (weights.read(f"{layer}.{end}") for end in ("qweight", "qzeros", "scales"))
    scales = scales.float()
    if quantization["quant_method"] == "awq":
        shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32)
        q, zeros = _unpack_columns(q, shifts, 0xF), _unpack_columns(zeros, shifts, 0xF)
        group = _even_groups(q.shape[0], scales.shape[0])
    else:
        bits = int(quantization["bits"])
        shifts, mask = torch.arange(0, 32, bits, dtype=torch.int32), (1 << bits) - 1
        q = _unpack_columns(q.T, shifts, mask).T
        zeros = _unpack_columns(zeros, shifts, mask) + 1
        has_order = f"{layer}.g_idx" in weights.shapes
        group = weights.read(f"{layer}.g_idx").long() if has_order else _even_groups(q.shape[0], scales.shape[0])
    steps = scales[group]
    return ((q - zeros[group]) * steps).T.contiguous(), steps.T.contiguous()


def _require_parts(weights: HfWeights, layer: str) -> None:
    if missing := [end for end in ("qzeros", "scales") if f"{layer}.{end}" not in weights.shapes]:
        raise ConversionError(f"{weights.folder}: {layer} must have {', '.join(missing)}, got none. Quantize it again.")


def _even_groups(num_inputs: int, num_groups: int) -> Tensor:
    return torch.arange(num_inputs) // (num_inputs // num_groups)


def _unpack_columns(packed: Tensor, shifts: Tensor, mask: int) -> Tensor:
    """[rows, n] int32 -> [rows, n * len(shifts)]; the shift keeps the sign, which the mask removes."""
    return ((packed[:, :, None] >> shifts) & mask).reshape(packed.shape[0], -1)


def iterate_plain_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a quantized folder under its usual name; fp32 for packed layers, else as stored."""
    quantization = read_quantization(folder)
    weights = open_hf_weights(folder)
    for layer in list_packed_layers(weights):
        yield f"{layer}.weight", read_packed_layer(weights, layer, quantization)[0]
    for name in weights.shapes:
        if name.rpartition(".")[2] not in PACKED_ENDINGS:
            yield name, weights.read(name)


def list_plain_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of `iterate_plain_weights`, in its order, without unpacking anything."""
    quantization = read_quantization(folder)
    weights = open_hf_weights(folder)
    shapes = weights.shapes
    # Inputs that share an int32 of qweight; AWQ packs outputs.
    num_joint_inputs = 1 if quantization["quant_method"] == "awq" else 32 // int(quantization["bits"])
    plain: dict[str, tuple[int, ...]] = {}
    for layer in list_packed_layers(weights):
        _require_parts(weights, layer)
        num_inputs = shapes[f"{layer}.qweight"][0] * num_joint_inputs
        plain[f"{layer}.weight"] = (shapes[f"{layer}.scales"][1], num_inputs)
    return plain | {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in PACKED_ENDINGS}


def read_quantization(folder: Path) -> dict[str, Any]:
    """quantization_config of a GPTQ or AWQ folder; raises ConversionError for another one."""
    config = read_config(folder / CONFIG_NAME)
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    is_known = method == "gptq" and quantization.get("bits") in (4, 8)
    is_known |= method == "awq" and quantization.get("version", "gemm") == "gemm" and quantization.get("bits") == 4
    if not is_known:
        raise ConversionError(
            f"{folder / CONFIG_NAME}, quantization_config: must be GPTQ of 4 or 8 bits or AWQ (gemm) of 4 bits, "
            f"got {quantization or 'none'}. Pass a folder that tools/quantize.py wrote."
        )
    return dict(quantization)


def write_plain_folder(quantized_dir: Path, plain_dir: Path) -> None:
    """Write the model that the packed layers stand for as an ordinary folder of fp16 weights, for evaluation.

    Kernels that compute in fp16 round each weight in the same way. Needs the disk space of the model before
    quantization, and the memory of one shard. The tokenizer is copied.
    """
    shards = plan_shards(list_plain_shapes(quantized_dir), dtype=torch.float16, max_shard_bytes=PLAIN_SHARD_BYTES)
    with ShardWriter(plain_dir, shards) as writer:
        for name, tensor in iterate_plain_weights(quantized_dir):
            writer.write(name, tensor.to(torch.float16))
    config = read_config(quantized_dir / CONFIG_NAME)
    del config["quantization_config"]
    (plain_dir / CONFIG_NAME).write_text(json.dumps(config, indent=2))
    copy_other_files(quantized_dir, plain_dir)


def copy_other_files(source_dir: Path, target_dir: Path) -> None:
    """Copy what is beside weights, config.json and README.md: the tokenizer, chat template, generation settings."""
    for path in sorted(source_dir.iterdir()):
        if path.is_file() and path.name not in _WRITTEN_ANEW and not path.name.endswith(_WEIGHT_ENDINGS):
            shutil.copyfile(path, target_dir / path.name)
