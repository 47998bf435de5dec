"""A Hugging Face folder written by hand: config.json of a toy Llama and random weights, without transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.hf_by_hand import list_shapes
from tests.helpers.toy_model import LLAMA

LLAMA_SIZES = {
    "vocab_size": LLAMA.vocab_size,
    "hidden_size": LLAMA.hidden_size,
    "intermediate_size": LLAMA.ffn_hidden_size,
    "num_hidden_layers": LLAMA.num_layers,
    "num_attention_heads": LLAMA.num_attention_heads,
    "num_key_value_heads": LLAMA.num_query_groups,
    "max_position_embeddings": LLAMA.max_position_embeddings,
}
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **LLAMA_SIZES,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
}


def draw_hf_weights(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.bfloat16, seed: int = 3
) -> dict[str, Tensor]:
    """Random weights under the names that transformers gives them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in list_shapes(config).items()}


def write_toy_folder(
    folder: Path, *, weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> dict[str, Tensor]:
    """Write config.json with `changes` and the weights (random ones); returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**LLAMA_CONFIG, **changes}
    weights = dict(draw_hf_weights(config, dtype=dtype) if weights is None else weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
