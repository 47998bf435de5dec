"""Tokenizer files of a Hugging Face folder that encode exactly as the tokenizer that the model was trained with.

A SentencePiece BPE model becomes `tokenizer.model` (copied) and `tokenizer.json` (encoding/hugging_face_tokenizer.py).
Files of a Hugging Face tokenizer are copied, also of a folder that has a tokenizer.model but no tokenizer.json. Nothing
is written before both encode the same texts alike. `export_tokenizer` fills the folder of an exported model.
`export_tokenizer_folder` makes a folder of its own. Before the folder gets its name, what transformers loads from it is
compared with the original: on a whole corpus (check_export.py), and in all that other files say (check_loading.py).
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.corpus.readers import Document
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.publish import publish_directory
from megatron_hammer.files.read import is_present
from megatron_hammer.tokenizer.encoding.encoder import (
    Encoder,
    HuggingFaceEncoder,
    SentencePieceEncoder,
    load_encoder,
    load_through_transformers,
)
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import (
    SAMPLE_TEXTS,
    build_fast_tokenizer,
    check_same_encoding,
    differs,
    list_texts_of,
)
from megatron_hammer.tokenizer.encoding.loading_by_class import describe_other_loading, is_known_to_load_alike
from megatron_hammer.tokenizer.encoding.sentencepiece_model import SentencePieceModel, read_sentencepiece_model
from megatron_hammer.tokenizer.encoding.special_tokens import CONFIG_NAME, read_config
from megatron_hammer.tokenizer.export.chat_format import TEMPLATE_NAME, ChatFormat, write_chat_format
from megatron_hammer.tokenizer.export.check_export import CheckedTexts, verify_with_transformers
from megatron_hammer.tokenizer.export.check_loading import require_loaded_alike

HF_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    TEMPLATE_NAME,
)


CHAT_TEMPLATES_DIR = "additional_chat_templates"
MODEL_CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedTokenizer:
    """What was written, and on how many texts both tokenizers agreed.

    copied_from: the folder whose files were copied; None where they were made from a SentencePiece model, or are those
    of a single file. note: a sentence where AutoTokenizer reads the source's folder otherwise than it is read here.
    """

    copied_from: Path | None
    note: str | None
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    num_checked_texts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedFolder:
    """What was written, and how much text and how many conversations transformers encodes as the original does.

    notes: what was changed for conversations.
    """

    tokenizer: ExportedTokenizer
    samples: CheckedTexts
    corpus: CheckedTexts
    num_conversations: int
    notes: tuple[str, ...]


def export_tokenizer_folder(
    source: Path,
    save_dir: Path,
    documents: Iterable[Document] = (),
    *,
    max_length: int | None = None,
    chat: ChatFormat | None = None,
    on_document: Callable[[int], None] = lambda num_documents: None,
) -> ExportedFolder:
    """Write a Hugging Face tokenizer folder that encodes every document as `source` does, or nothing at all.

    documents: read once, streamed; `on_document` is told how many were compared. chat: added last.
    Raises ConversionError at the first text on which both differ, and if `save_dir` holds anything.
    """
    with publish_directory(save_dir) as partial_dir:
        try:
            tokenizer = export_tokenizer(source, partial_dir, max_length=max_length)
        except ConversionError as error:  # without the tokenizer there is nothing to write
            raise ConversionError(
                *(problem.replace("Pass --no-tokenizer and encode", "Encode") for problem in error.problems)
            ) from error
        if tokenizer.copied_from is not None:
            _name_class(source, partial_dir)
            require_loaded_alike(source, partial_dir)
        encoder = _load_as_exported(source)
        samples = verify_with_transformers(encoder, partial_dir, list_samples(encoder))
        corpus = verify_with_transformers(encoder, partial_dir, documents, on_document)
        notes = () if chat is None else write_chat_format(partial_dir, chat)
        num_conversations = 0 if chat is None else chat.check(partial_dir)
    return ExportedFolder(
        tokenizer=tokenizer, samples=samples, corpus=corpus, num_conversations=num_conversations, notes=notes
    )


def list_samples(encoder: Encoder) -> Iterable[Document]:
    """Texts that have told tokenizers apart, and every piece of a SentencePiece model by itself."""
    texts = [*SAMPLE_TEXTS]
    if isinstance(encoder, SentencePieceEncoder):
        texts += list_texts_of(read_sentencepiece_model(encoder.path))
    return (Document(text, "sample text", line) for line, text in enumerate(texts, start=1))


def export_tokenizer(source: Path, target_dir: Path, *, max_length: int | None) -> ExportedTokenizer:
    """Write the tokenizer files for `source` (a `.model`, a tokenizer.json or its folder) into `target_dir`.

    max_length: the model's positions, or None to set no limit; a copied Hugging Face tokenizer keeps its own.
    Raises ConversionError if no exact Hugging Face tokenizer can be made, DataError if `source` is not a tokenizer.
    """
    encoder = _load_as_exported(source)
    is_copied = not isinstance(encoder, SentencePieceEncoder)
    if isinstance(encoder, SentencePieceEncoder):
        num_checked_texts = _export_sentencepiece(encoder, target_dir, max_length)
    else:
        num_checked_texts = _copy_hugging_face(encoder, source, target_dir)
    return ExportedTokenizer(
        copied_from=source if is_copied and source.is_dir() else None,
        note=_describe_other_reading(encoder, source),
        vocab_size=encoder.vocab_size,
        bos_id=encoder.bos_id,
        eos_id=encoder.eod_id,
        num_checked_texts=num_checked_texts,
    )


def _describe_other_reading(encoder: Encoder, source: Path) -> str | None:
    if isinstance(encoder, HuggingFaceEncoder):
        difference = None if is_known_to_load_alike(encoder) else describe_other_loading(encoder)
        rest = "The export has the same files; what was encoded here has the ids of the file."
    else:
        # Of a folder: a .model by itself is what its user named.
        difference = describe_other_loading(encoder) if source.is_dir() else None
        rest = "The export encodes as the file."
    return None if difference is None else f"{difference} {rest}"


def _export_sentencepiece(encoder: SentencePieceEncoder, target_dir: Path, max_length: int | None) -> int:
    model = read_sentencepiece_model(encoder.path)
    tokenizer = build_fast_tokenizer(model, name=str(encoder.path))
    texts = [*SAMPLE_TEXTS, *list_texts_of(model)]
    check_same_encoding(encoder, tokenizer, texts)
    tokenizer.encode_special_tokens = False  # not a part of tokenizer.json; transformers sets it from the config
    shutil.copyfile(encoder.path, target_dir / "tokenizer.model")
    tokenizer.save(str(target_dir / "tokenizer.json"))
    config = _tokenizer_config(model, encoder, max_length)
    (target_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return len(texts)


def _load_as_exported(source: Path) -> Encoder:
    """The encoder of what is written: of a folder that transformers saved, what transformers makes of its files."""
    encoder = load_encoder(source)
    # Its files say more than tokenizer.model does, such as a chat template and what is put around a text.
    is_saved_by_transformers = source.is_dir() and is_present(source / CONFIG_NAME)
    if isinstance(encoder, SentencePieceEncoder) and is_saved_by_transformers:
        return load_through_transformers(source)
    return encoder


def _copy_hugging_face(encoder: Encoder, source: Path, target_dir: Path) -> int:
    folder = source if source.is_dir() else source.parent
    # By name and not all files: the folder may hold weights, and code.
    for name in HF_TOKENIZER_FILES:
        if is_present(file := folder / name):
            shutil.copyfile(file, target_dir / name)
    if (folder / CHAT_TEMPLATES_DIR).is_dir():
        shutil.copytree(folder / CHAT_TEMPLATES_DIR, target_dir / CHAT_TEMPLATES_DIR)
    if source.is_dir() and not is_present(source / "tokenizer.json"):
        return 0  # what it does depends on config.json too, so it is compared once the folder is complete
    # Encoded again from the copy: tokenizer_config.json beside it changes what tokenizer.json does.
    copied = _load_as_exported(target_dir if source.is_dir() else target_dir / source.name)
    for text in SAMPLE_TEXTS:
        if not np.array_equal(copied.encode(text), encoder.encode(text)):
            raise differs(text, encoder.encode(text).tolist(), copied.encode(text).tolist())
    return len(SAMPLE_TEXTS)


def _name_class(source: Path, target_dir: Path) -> None:
    """Where config.json names the class of the tokenizer, a folder without the model needs those two fields of it."""
    config = read_config(source / MODEL_CONFIG_NAME)
    fields = {key: config[key] for key in ("model_type", "tokenizer_class") if key in config}
    if fields:
        (target_dir / MODEL_CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n")


def _tokenizer_config(model: SentencePieceModel, encoder: Encoder, max_length: int | None) -> dict[str, Any]:
    """split_special_tokens: a control token spelt out in text is text, as in sentencepiece."""
    config: dict[str, Any] = {
        # Not LlamaTokenizerFast: that class rebuilds parts of the tokenizer by rules of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    names = {"bos_token": encoder.bos_id, "eos_token": encoder.eod_id}
    config |= {name: model.pieces[token_id].text for name, token_id in names.items() if token_id is not None}
    return config if model.unknown_piece is None else config | {"unk_token": model.unknown_piece}
