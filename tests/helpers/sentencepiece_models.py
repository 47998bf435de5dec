"""Small SentencePiece models of every setting that changes how text is encoded."""

import io
from pathlib import Path
from typing import Any

import sentencepiece

from tests.helpers.toy_tokenizer import TOY_TEXTS

_EXACT = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "model_type": "bpe",
    "vocab_size": 353,
}
_SYMBOLS = {"user_defined_symbols": ["0", "1", "2", "```", "<h1>", "th", "the q", "花落"]}

MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": _EXACT,
    "dummy prefix": _EXACT | {"add_dummy_prefix": True},
    "no byte fallback": _EXACT | {"byte_fallback": False, "vocab_size": 131},
    "symbols": _EXACT | _SYMBOLS,
    "symbols and prefix": _EXACT | _SYMBOLS | {"add_dummy_prefix": True},
    "symbols of whitespace": _EXACT | {"user_defined_symbols": ["▁▁", "▁fox"]},
    "normalised": _EXACT | {"normalization_rule_name": "nfkc"},
    "extra whitespace removed": _EXACT | {"remove_extra_whitespaces": True},
    "symbols and extra whitespace removed": _EXACT | _SYMBOLS | {"remove_extra_whitespaces": True},
    "unigram": _EXACT | {"model_type": "unigram"},
}


def train_model(path: Path, **options: Any) -> Path:
    """Train on the toy texts with these options of sentencepiece and return `path`."""
    model = io.BytesIO()
    lines = [line for text in TOY_TEXTS for line in text.splitlines()] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path
