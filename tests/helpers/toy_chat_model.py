"""A toy Llama as a Hugging Face folder with a tokenizer that has the control tokens of chat templates, and toy data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers.chat_tokenizers import train_with_symbols
from tests.helpers.toy_hf_folder import LLAMA_CONFIG, draw_hf_weights, write_toy_folder

NUM_POSITIONS = 96
# More rows than pieces, as models have that are padded; no two sizes are equal.
SIZES = {
    "vocab_size": 368,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": NUM_POSITIONS,
}
WORDS = ("fox", "dog", "quick", "brown", "jumps", "lazy", "over", "sleeps")


def write_chat_model(folder: Path, *, dtype: str = "float32") -> Path:
    """The folder, without a chat template."""
    config = {**LLAMA_CONFIG, **SIZES, "torch_dtype": dtype, "eos_token_id": 2}
    drawn = draw_hf_weights(config, dtype=torch.float32)
    weights = {name: (0.1 * weight).to(getattr(torch, dtype)) for name, weight in drawn.items()}
    write_toy_folder(folder, weights=weights, **config)
    export_tokenizer(train_with_symbols(folder.with_name("chat.model")), folder, max_length=NUM_POSITIONS)
    return folder


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def list_conversations() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": f"{word} {word}"}]}
        for word in WORDS
    ]


def list_preferences() -> list[dict[str, Any]]:
    return [{"instruction": f"the {word}", "chosen": f"{word}", "rejected": f"not {word} at all"} for word in WORDS]
