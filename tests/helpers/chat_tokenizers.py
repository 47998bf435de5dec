"""Small tokenizers that have the control tokens of chat templates, each in another way."""

import dataclasses
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    PieceType,
    read_sentencepiece_model,
    serialize_sentencepiece_model,
)
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import TOY_TEXTS

CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def train_with_symbols(path: Path) -> Path:
    """Chat tokens are user-defined symbols, as in HammerLLM's model: sentencepiece finds them in text."""
    options = MODEL_OPTIONS["symbols"]
    symbols = [*options["user_defined_symbols"], *CHAT_TOKENS]
    return train_model(path, **options | {"user_defined_symbols": symbols, "vocab_size": 361})


def train_with_controls(path: Path, kind: str = "plain") -> Path:
    """Chat tokens are control symbols: sentencepiece never finds them in text."""
    return train_model(path, **MODEL_OPTIONS[kind] | {"control_symbols": list(CHAT_TOKENS), "vocab_size": 361})


def load_with_controls(path: Path) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece itself, with the chat tokens of a model as control symbols."""
    model = read_sentencepiece_model(path)
    pieces = tuple(
        dataclasses.replace(piece, type=PieceType.CONTROL) if piece.text in CHAT_TOKENS else piece
        for piece in model.pieces
    )
    content = serialize_sentencepiece_model(dataclasses.replace(model, pieces=pieces))
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def write_byte_level(path: Path, *, special: bool = True) -> Path:
    """A tokenizer.json as of Qwen: BPE of bytes, special chat tokens, and tags that are found in every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (*TOY_TEXTS, "x\n\n\n\n" * 9) * 5  # with tokens of several line ends
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=331, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|bos|>"])
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in CHAT_TOKENS])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>"])
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}'
    )
    return path
