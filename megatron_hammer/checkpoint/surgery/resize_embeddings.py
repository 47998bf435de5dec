"""A Hugging Face model for an extended tokenizer: new rows in its embeddings, everything else byte for byte.

New rows are made as new_rows.py says, in the input embeddings and in the output layer. Rows after those of the old
pieces are padding, which no text has used: new pieces take their place, and padding that no new piece needs stays.
resize_vocabulary.py does the same to Megatron's checkpoints.

Left out on purpose: making a vocabulary smaller, quantised weights, and models whose embeddings have other names.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, read_config
from megatron_hammer.checkpoint.hugging_face.model_card import MODEL_CARD_NAME
from megatron_hammer.checkpoint.surgery.new_rows import build_new_rows, load_extension
from megatron_hammer.checkpoint_files.safetensors.copy_with_rows import (
    InsertedRows,
    copy_with_rows,
    list_different_tensors,
)
from megatron_hammer.checkpoint_files.safetensors.header import HeaderEntry, read_header
from megatron_hammer.checkpoint_files.safetensors.shard_writer import INDEX_FILE
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.publish import publish_directory
from megatron_hammer.files.read import is_present
from megatron_hammer.tokenizer.encoding.encoder import Encoder
from megatron_hammer.tokenizer.export.check_export import verify_with_transformers
from megatron_hammer.tokenizer.export.export_tokenizer import HF_TOKENIZER_FILES, export_tokenizer, list_samples
from megatron_hammer.tokenizer.vocabulary.extension import spell_new_pieces

EMBEDDING_NAMES = ("model.embed_tokens.weight", "transformer.wte.weight")  # Llama, Qwen2, Mistral, ...; GPT-2
HEAD_NAME = "lm_head.weight"
HEAD_BIAS_NAME = "lm_head.bias"  # a bias has one entry per piece too, but no rule says what a new one is
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizeOptions:
    """has_tokenizer: False leaves the tokenizer's files out, for one that Hugging Face cannot express."""

    model_dir: Path
    old_tokenizer_path: Path
    new_tokenizer_path: Path
    save_dir: Path
    has_tokenizer: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizeReport:
    """What was written. num_reused_padding_rows: of the new pieces' rows, those that were padding before.

    num_unspelled_pieces: new pieces that got the mean of all old ones. left_out: files and folders not copied.
    """

    save_dir: Path
    resized: tuple[str, ...]
    num_old_rows: int
    num_new_rows: int
    num_added_pieces: int
    num_reused_padding_rows: int
    num_kept_padding_rows: int
    num_unspelled_pieces: int
    has_tokenizer: bool
    num_copied_tensors: int
    left_out: tuple[str, ...]
    elapsed_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A folder that has been read: its config.json, its weight files, and where each tensor lies."""

    directory: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    shard_names: tuple[str, ...]
    tensors: Mapping[str, HeaderEntry]
    matrices: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        return self.tensors[self.matrices[0]].shape[0]


def resize_embeddings(options: ResizeOptions, on_stage: Callable[[str], None] = lambda stage: None) -> ResizeReport:
    """Write `options.save_dir`, complete and read back, or nothing; `on_stage` is told what is being done.

    Raises ConversionError for a model that cannot be resized, DataError if the tokenizers do not fit each other.
    """
    started_at_s = time.monotonic()
    model = _read_model(options.model_dir)
    old, new = load_extension(
        options.old_tokenizer_path,
        options.new_tokenizer_path,
        num_rows=model.num_rows,
        rows=f"{model.num_rows:,} rows in {model.directory}",
        remedy="Pass the tokenizer that the model was trained with.",
    )
    with publish_directory(options.save_dir) as partial_dir:
        if options.has_tokenizer:  # first, as it may turn out that Hugging Face cannot express it
            on_stage("writing the tokenizer")
            _write_tokenizer(model, new, partial_dir)
        on_stage("spelling new pieces")
        spellings = list(spell_new_pieces(old, new))
        on_stage("computing rows")
        inserted = {name: _build_rows(model.tensors[name], old.vocab_size, spellings) for name in model.matrices}
        _write_weights(model, partial_dir, inserted, on_stage)
        left_out = _copy_other_files(model.directory, partial_dir)
        # transformers sizes the embedding by vocab_size, so it counts kept padding too.
        config = model.config | {"vocab_size": max(model.num_rows, new.vocab_size)}
        _write_json(partial_dir / CONFIG_NAME, config)
        if options.has_tokenizer:  # last, as transformers looks into config.json too
            on_stage("comparing the tokenizer")
            verify_with_transformers(new, partial_dir, list_samples(new))
    return ResizeReport(
        save_dir=options.save_dir,
        resized=model.matrices,
        num_old_rows=model.num_rows,
        num_new_rows=max(model.num_rows, new.vocab_size),
        num_added_pieces=new.vocab_size - old.vocab_size,
        num_reused_padding_rows=min(model.num_rows, new.vocab_size) - old.vocab_size,
        num_kept_padding_rows=max(0, model.num_rows - new.vocab_size),
        num_unspelled_pieces=sum(not ids for ids in spellings),
        has_tokenizer=options.has_tokenizer,
        num_copied_tensors=len(model.tensors) - len(model.matrices),
        left_out=left_out,
        elapsed_s=time.monotonic() - started_at_s,
    )


def _read_model(directory: Path) -> _Model:
    config = read_config(directory / CONFIG_NAME)
    index_path = directory / INDEX_FILE
    index = read_config(index_path) if is_present(index_path) else None
    if index is not None and not isinstance(index.get("weight_map"), dict):
        raise ConversionError(f"{index_path}: index must hold a weight_map, got none. Fetch the file again.")
    # Each name once, in the order of the index.
    shard_names = tuple(dict.fromkeys(index["weight_map"].values())) if index else ("model.safetensors",)
    tensors: dict[str, HeaderEntry] = {}
    for name in shard_names:
        tensors |= read_header(directory / name)[0]
    return _Model(
        directory=directory,
        config=config,
        index=index,
        shard_names=shard_names,
        tensors=tensors,
        matrices=_find_matrices(directory, config, tensors),
    )


def _find_matrices(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, HeaderEntry]) -> tuple[str, ...]:
    """Names of the matrices with one row per piece; raises ConversionError with every reason why they are not known.

    An output layer that is stored although it is tied is resized like the embeddings.
    """
    embedding = next((name for name in EMBEDDING_NAMES if name in tensors), None)
    if embedding is None:
        raise ConversionError(
            f"{directory}: weights must hold {' or '.join(EMBEDDING_NAMES)}, got neither among {len(tensors)} tensors. "
            "Only models with these names can be resized."
        )
    names = (embedding, *([HEAD_NAME] if HEAD_NAME in tensors else []))
    num_rows = tensors[embedding].shape[0]
    checks = [
        ("quantization_config" in config, "config.json", "weights must not be quantised, got a quantization_config"),
        (
            config.get("vocab_size") != num_rows,
            "config.json",
            f"vocab_size must be the rows of {embedding}, got vocab_size={config.get('vocab_size')}, rows={num_rows}",
        ),
        (
            config.get("tie_word_embeddings") is False and HEAD_NAME not in tensors,
            "config.json",
            f"a model that is not tied must hold {HEAD_NAME}, got none",
        ),
        (HEAD_BIAS_NAME in tensors, HEAD_BIAS_NAME, "output layer must have no bias, got one"),
        *(
            (
                tensors[name].dtype not in DTYPES,
                name,
                f"weights must be {', '.join(DTYPES)}, got {tensors[name].dtype}",
            )
            for name in names
        ),
        *(
            (
                len(tensors[name].shape) != 2 or tensors[name].shape[0] != num_rows,
                name,
                f"expected a matrix of {num_rows} rows, got {tensors[name].shape}",
            )
            for name in names
        ),
    ]
    problems = [
        f"{directory}: {where}: {fact}. This model cannot be resized." for is_wrong, where, fact in checks if is_wrong
    ]
    if problems:
        raise ConversionError(*problems)
    return names


def _build_rows(stored: HeaderEntry, num_old_pieces: int, spellings: Sequence[list[int]]) -> InsertedRows:
    """The new pieces' rows of one matrix, in its dtype."""
    old_rows = _read_matrix(stored)[:num_old_pieces]
    rows = build_new_rows(old_rows, spellings)
    return InsertedRows(
        first_row=num_old_pieces,
        num_rows=len(rows),
        data=memoryview(rows.reshape(-1).view(torch.uint8).numpy()),
    )


def _read_matrix(stored: HeaderEntry) -> Tensor:
    dtype = DTYPES[stored.dtype]
    flat = torch.from_file(
        str(stored.path), shared=False, size=stored.start + stored.num_bytes, dtype=torch.uint8
    )  # a memory map: only the pages that are used are read
    return flat[stored.start :].clone().view(dtype).reshape(stored.shape)


def _write_weights(
    model: _Model, target_dir: Path, inserted: Mapping[str, InsertedRows], on_stage: Callable[[str], None]
) -> None:
    """Every shard under its name, read back and compared; an index with the new sizes if the model has one."""
    for name in model.shard_names:
        on_stage(f"writing {name}")
        source, target = model.directory / name, target_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_with_rows(source, target, inserted)
        on_stage(f"reading back {name}")
        if different := list_different_tensors(source, target, inserted):
            raise ConversionError(
                *(
                    f"{tensor}: what was written must read back equal, got a difference in {target}. Check the disk."
                    for tensor in different
                )
            )
    if model.index is not None:
        _write_json(target_dir / INDEX_FILE, _resize_index(model.index, model, target_dir))


def _resize_index(index: dict[str, Any], model: _Model, target_dir: Path) -> dict[str, Any]:
    """transformers counts the bytes, and since version 5 the parameters, of all shards in the index."""
    metadata = dict(index.get("metadata", {}))
    written = [tensor for name in model.shard_names for tensor in read_header(target_dir / name)[0].values()]
    # Only the fields that the model's index has.
    if "total_size" in metadata:
        metadata["total_size"] = sum(tensor.num_bytes for tensor in written)
    if "total_parameters" in metadata:
        # All added bytes are rows in the embeddings' dtype; other tensors may be of another.
        grown = sum(tensor.num_bytes for tensor in written) - sum(tensor.num_bytes for tensor in model.tensors.values())
        itemsize = DTYPES[model.tensors[model.matrices[0]].dtype].itemsize
        metadata["total_parameters"] += grown // itemsize
    return index | {"metadata": metadata}


def _copy_other_files(source_dir: Path, target_dir: Path) -> tuple[str, ...]:
    """Copy what is neither weights nor the old tokenizer's nor config.json; returns what was left out."""
    left_out = []
    for path in sorted(source_dir.iterdir()):
        if path.name in (*HF_TOKENIZER_FILES, INDEX_FILE, CONFIG_NAME, "added_tokens.json"):
            continue
        # The new tokenizer has written it already.
        if (target_dir / path.name).exists():
            continue
        # Other weights, such as a .bin beside the safetensors, would have the old number of rows. The model card
        # describes the model before: what it says of the vocabulary is no longer true.
        if path.is_dir() or path.name == MODEL_CARD_NAME or path.name.endswith(WEIGHT_SUFFIXES):
            left_out.append(path.name)
            continue
        if is_present(path):
            shutil.copyfile(path, target_dir / path.name)
    return tuple(left_out)


def _write_tokenizer(model: _Model, new: Encoder, target_dir: Path) -> None:
    """The new tokenizer's files; the model's chat template stays with it."""
    export_tokenizer(new.path, target_dir, max_length=_find_max_length(model))
    template = model.directory / "chat_template.jinja"
    if is_present(template) and not (target_dir / template.name).exists():
        shutil.copyfile(template, target_dir / template.name)


def _find_max_length(model: _Model) -> int | None:
    path = model.directory / "tokenizer_config.json"
    saved = read_config(path).get("model_max_length") if is_present(path) else None
    max_length = saved if isinstance(saved, int) else model.config.get("max_position_embeddings")
    return max_length if isinstance(max_length, int) else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
