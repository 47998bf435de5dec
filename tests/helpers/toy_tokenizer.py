"""A SentencePiece model small enough to train in every test session."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_hammer.tokenizer.vocabulary.recipes import TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import TextSource
from megatron_hammer.tokenizer.vocabulary.train import train_tokenizer

TOY_VOCAB_SIZE = 347
TOY_TEXTS = (
    "the quick brown fox jumps over the lazy dog\nthe dog sleeps, the fox does not\n",
    "def add(first, second):\n    return first + second  # 1 + 2 == 3\n",
    "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。\n",
)


def write_jsonl(path: Path, texts: tuple[str, ...] | list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def train_toy_tokenizer(folder: Path) -> Path:
    corpus_path = write_jsonl(folder / "toy_tokenizer.jsonl", TOY_TEXTS * 5)
    return train_tokenizer(
        [TextSource(inputs=(corpus_path,))], folder / "toy.model", TokenizerRecipe(vocab_size=TOY_VOCAB_SIZE)
    ).path


LLAMA_ADDED_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>", "<tool>")
LLAMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_llama_folder(folder: Path, model_path: Path, num_pieces: int, **changes: Any) -> Path:
    """A tokenizer folder as of Llama 1 and 2: tokenizer.model, added tokens beside it, and no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model_path, folder / "tokenizer.model")
    added = {text: num_pieces + number for number, text in enumerate(LLAMA_ADDED_TOKENS)}
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "model_max_length": 77}
    config |= named | {"chat_template": LLAMA_CHAT_TEMPLATE}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder
