"""A SentencePiece model small enough to train in every test session."""

import json
from pathlib import Path

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
