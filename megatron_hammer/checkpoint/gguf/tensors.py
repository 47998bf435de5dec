"""The tensors of a GGUF file for one model: names, order, layout and type, all known before a tensor is read.

The Hugging Face side is the rows of `tensor_rows.py`, so that every tensor has exactly one row; the names on the side
of llama.cpp come from the `gguf` package.
"""

import math
from dataclasses import dataclass

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from torch import Tensor

from megatron_hammer.checkpoint.gguf.experts import (
    ROUTER,
    is_stack,
    name_stack,
    require_writable_experts,
    spell_for_lookup,
)
from megatron_hammer.checkpoint.gguf.file_types import FileType, Place, count_tensor_bytes, select_type
from megatron_hammer.checkpoint.hugging_face.config_json import HfModel
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.rotary_rows import permute_rope, unpermute_rope
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, RopeScaling

# llama.cpp's own converter also writes Mistral as arch llama (LlamaModel in convert_hf_to_gguf.py).
ARCHITECTURES = {  # by family
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "ministral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "phi3": MODEL_ARCH.PHI3,
    "seed_oss": MODEL_ARCH.SEED_OSS,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "granite": MODEL_ARCH.GRANITE,
    "glm4_moe": MODEL_ARCH.GLM4_MOE,
    "solar_open": MODEL_ARCH.GLM4_MOE,
    "dots1": MODEL_ARCH.DOTS1,
    "helium": MODEL_ARCH.LLAMA,  # its rows already have the order of that arch
}
SUPPORTED = (
    "Llama, TinyLlama, HammerLLM, Mistral, Qwen2, tiny-llm-zh, Qwen3, Phi-3, Seed-OSS, SmolLM3, Granite, Helium, "
    "GLM-4.5, Solar Open, dots.llm1"
)
# The archs that rotate neighbouring rows (LLAMA_ROPE_TYPE_NORM), and the families that store them so.
TURNS_NEIGHBOURS = frozenset({MODEL_ARCH.LLAMA, MODEL_ARCH.SMOLLM3, MODEL_ARCH.GRANITE})
STORES_NEIGHBOURS = frozenset({"helium"})
STEP_WITHOUT_ROPE = 4  # llama.cpp's arch smollm3 has it built in: n_no_rope_layer_step
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """One tensor. rope_heads: the heads whose rows take llama.cpp's order, None where rows stay as they are.

    hf_name: of a tensor of the folder, or of all experts of a layer (experts.py).
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    rope_heads: int | None = None

    @property
    def num_bytes(self) -> int:
        return count_tensor_bytes(self.shape, self.type)

    def arrange(self, tensor: Tensor) -> Tensor:
        """A Hugging Face tensor in llama.cpp's order; exact inverse of `restore`."""
        return tensor if self.rope_heads is None else permute_rope(tensor, num_heads=self.rope_heads)

    def restore(self, tensor: Tensor) -> Tensor:
        """A tensor of the file in transformers' order."""
        return tensor if self.rope_heads is None else unpermute_rope(tensor, num_heads=self.rope_heads)


def select_architecture(model: HfModel) -> MODEL_ARCH:
    """llama.cpp's arch for the model; raises ConversionError where none is mapped."""
    arch = ARCHITECTURES.get(model.family.model_type)
    if arch is None:
        raise ConversionError(
            f"config.json, model_type: GGUF is written for {SUPPORTED}, got model_type={model.config['model_type']!r}, "
            f"which is {model.family.hf_class}. Use llama.cpp's own converter."
        )
    if window := model.shape.sliding_window:
        raise ConversionError(
            f"config.json, sliding_window: must be null, got sliding_window={window.num_tokens}: llama.cpp's arch "
            f"{MODEL_ARCH_NAMES[arch]} has no window, and would compute something else for longer texts. Set it to "
            "null in a copy of the folder to accept that."
        )
    heads, groups = model.shape.num_attention_heads, model.shape.num_query_groups
    if arch is MODEL_ARCH.DOTS1 and groups != heads:
        raise ConversionError(
            "config.json, num_key_value_heads: llama.cpp's arch dots1 has a key and a value for every head, got "
            f"num_key_value_heads={groups}, num_attention_heads={heads}. Keep the Hugging Face folder."
        )
    layers, num_layers = model.shape.layers_without_rope, model.shape.num_layers
    if arch is MODEL_ARCH.SMOLLM3 and layers != tuple(range(STEP_WITHOUT_ROPE - 1, num_layers, STEP_WITHOUT_ROPE)):
        raise ConversionError(
            f"config.json, no_rope_layers: llama.cpp leaves the rope out of every {STEP_WITHOUT_ROPE}th layer of a "
            f"SmolLM3, got none in layers {list(layers)} of {num_layers}, from 0. Keep the Hugging Face folder."
        )
    return arch


def plan_tensors(model: HfModel, file_type: FileType) -> list[GgufTensor]:
    """Every tensor that comes from a Hugging Face one, in the order in which it is written."""
    arch = select_architecture(model)
    require_writable_experts(model.shape, file_type)
    names = get_tensor_name_map(arch, model.shape.num_layers)
    heads = {"attn_q": model.shape.num_attention_heads, "attn_k": model.shape.num_query_groups}
    tensors = []
    for pair in expand(model.family, model.shape):
        for part_name, part_shape in zip(pair.hf_names, pair.hf_shapes, strict=True):
            hf_name = name_stack(part_name)
            if hf_name is None:
                continue
            shape = (model.shape.moe.num_experts, *part_shape) if model.shape.moe and is_stack(hf_name) else part_shape
            # The package's map has no endings, so they are taken off, and put back after the lookup.
            name = names.get_name(spell_for_lookup(hf_name), try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ConversionError(f"{hf_name}: llama.cpp must have a name for it, got none. Update gguf.")
            place = _find_place(name, model.shape)
            # rotary_rows.py has the two orders.
            is_reordered = arch in TURNS_NEIGHBOURS and model.family.model_type not in STORES_NEIGHBOURS
            rope_heads = heads.get(place.kind) if is_reordered else None
            tensor_type = GGMLQuantizationType.F32 if place.kind == ROUTER else select_type(file_type, place, shape)
            tensors.append(GgufTensor(name=name, hf_name=hf_name, shape=shape, type=tensor_type, rope_heads=rope_heads))
    return tensors


def _find_place(name: str, model: ModelShape) -> Place:
    """blk.3.attn_v.weight is "attn_v" of layer 3."""
    parts = name.split(".")
    return Place(
        kind=parts[-2],
        layer=int(parts[1]) if parts[0] == "blk" else 0,
        num_layers=model.num_layers,
        heads_per_group=model.num_attention_heads // model.num_query_groups,
        # Without a head of its own the file has no output.weight, and llama.cpp uses token_embd for it.
        is_output=parts[-2] == "output" or (model.has_tied_embeddings and parts[-2] == "token_embd"),
    )


def compute_rope_factors(scaling: RopeScaling, *, rotary_base: float, head_dim: int) -> Tensor:
    """What llama.cpp divides the rotary frequencies [d/2] by for Llama 3.1's longer contexts, f32.

    Short wavelengths stay, long ones are multiplied by `factor`, and in between the frequency is interpolated.
    Source: transformers' _compute_llama3_parameters; a division in place of its multiplication.
    """
    # f64, so that the result is rounded once, to the f32 of the file.
    frequencies = rotary_base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies  # in tokens
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    # 1 for wavelengths below context / high (kept), 0 for those above context / low (divided by `factor`).
    share = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).float()
