"""Tokenizer files of a Hugging Face folder that encode exactly as the tokenizer that the model was trained with.

A SentencePiece BPE model becomes `tokenizer.model` (copied) and `tokenizer.json` (tokenizer/hugging_face.py). Files of
a Hugging Face tokenizer are copied. Nothing is written before both encode the same texts alike.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.tokenizer.encoder import Encoder, SentencePieceEncoder, load_encoder
from megatron_hammer.tokenizer.hugging_face import (
    SAMPLE_TEXTS,
    build_fast_tokenizer,
    check_same_encoding,
    differs,
    list_piece_texts,
)
from megatron_hammer.tokenizer.sentencepiece_model import PieceType, SentencePieceModel, read_sentencepiece_model

HF_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedTokenizer:
    """What was written, and on how many texts both tokenizers agreed."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    num_checked_texts: int


def export_tokenizer(source: Path, target_dir: Path, *, max_length: int) -> ExportedTokenizer:
    """Write the tokenizer files for `source` (a `.model`, a tokenizer.json or its folder) into `target_dir`.

    Raises ConversionError if no exact Hugging Face tokenizer can be made, DataError if `source` is not a tokenizer.
    """
    encoder = load_encoder(source)
    if isinstance(encoder, SentencePieceEncoder):
        num_checked_texts = _export_sentencepiece(encoder, target_dir, max_length)
    else:
        num_checked_texts = _copy_hugging_face(encoder, target_dir)
    return ExportedTokenizer(
        vocab_size=encoder.vocab_size, bos_id=encoder.bos_id, eos_id=encoder.eod_id, num_checked_texts=num_checked_texts
    )


def _export_sentencepiece(encoder: SentencePieceEncoder, target_dir: Path, max_length: int) -> int:
    model = read_sentencepiece_model(encoder.path)
    tokenizer = build_fast_tokenizer(model, name=str(encoder.path))
    texts = [*SAMPLE_TEXTS, *list_piece_texts(model)]
    check_same_encoding(encoder, tokenizer, texts)
    tokenizer.encode_special_tokens = False  # not a part of tokenizer.json; transformers sets it from the config
    shutil.copyfile(encoder.path, target_dir / "tokenizer.model")
    tokenizer.save(str(target_dir / "tokenizer.json"))
    config = _tokenizer_config(model, encoder, max_length)
    (target_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return len(texts)


def _copy_hugging_face(encoder: Encoder, target_dir: Path) -> int:
    for name in HF_TOKENIZER_FILES:
        if (file := encoder.path.with_name(name)).is_file():
            shutil.copyfile(file, target_dir / name)
    copied = load_encoder(target_dir / encoder.path.name)
    for text in SAMPLE_TEXTS:
        if not np.array_equal(copied.encode(text), encoder.encode(text)):
            raise differs(text, encoder.encode(text).tolist(), copied.encode(text).tolist())
    return len(SAMPLE_TEXTS)


def _tokenizer_config(model: SentencePieceModel, encoder: Encoder, max_length: int) -> dict[str, Any]:
    """split_special_tokens: a control token spelt out in text is text, as in sentencepiece."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    names = {"bos_token": encoder.bos_id, "eos_token": encoder.eod_id}
    config |= {name: model.pieces[token_id].text for name, token_id in names.items() if token_id is not None}
    unknown = next((piece.text for piece in model.pieces if piece.type is PieceType.UNKNOWN), None)
    return config if unknown is None else config | {"unk_token": unknown}
