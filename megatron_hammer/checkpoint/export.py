"""Megatron's torch_dist checkpoint to a complete Hugging Face folder, verified before it gets its name.

The path: open the checkpoint, choose the family, compare every name and shape, write into `<out>.partial` tensor by
tensor, read everything back through the inverse mapping, rename. A failure leaves nothing; config.json comes last, so
that even a killed conversion leaves nothing that loads.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.architecture import Architecture, read_architecture
from megatron_hammer.checkpoint.hf_config import build_config, build_generation_config
from megatron_hammer.checkpoint.mapping import (
    Family,
    TensorPair,
    expand,
    select_family,
    validate_names_and_shapes,
)
from megatron_hammer.checkpoint.model_card import build_model_card
from megatron_hammer.checkpoint.partial_directory import open_directory_atomically
from megatron_hammer.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_hammer.checkpoint.safetensors_stream import Shard, plan_shards, write_shards
from megatron_hammer.errors import ConversionError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000  # transformers' own


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """dtype: a key of DTYPES, or None for the stored one. tokenizer_path: None for the one the checkpoint names.

    vocab_size: None for the checkpoint's. has_tokenizer: False leaves the tokenizer's files out.
    """

    load_dir: Path
    save_dir: Path
    iteration: int | None = None
    tokenizer_path: Path | None = None
    has_tokenizer: bool = True
    vocab_size: int | None = None
    dtype: str | None = None
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written; `notes` are sentences about what was left out."""

    save_dir: Path
    hf_class: str
    iteration: int
    num_megatron_tensors: int
    num_hf_tensors: int
    num_parameters: int
    num_shards: int
    dtype: str
    num_checked_texts: int
    elapsed_s: float
    notes: tuple[str, ...]


def export_to_hugging_face(
    options: ExportOptions, on_tensor: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> ExportReport:
    """Convert a checkpoint; `on_tensor(stage, done, total)` is told of every Megatron tensor written and verified.

    Raises HammerError for everything a user can cause; then nothing is left under `save_dir` or beside it.
    """
    started_at_s = time.monotonic()
    _validate_target(options)
    reader = open_checkpoint(options.load_dir, iteration=options.iteration)
    model = read_architecture(reader.args, vocab_size=options.vocab_size)
    family = select_family(model)
    pairs = expand(family, model)
    reader.remove_vocab_padding(model.vocab_size)
    validate_names_and_shapes(
        {pair.megatron_name: pair.megatron_shape for pair in pairs},
        {name: stored.shape for name, stored in reader.tensors.items()},
        where=str(reader.directory),
    )
    dtype = _select_dtype(options.dtype, reader)
    shapes = {name: shape for pair in pairs for name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)}
    shards = plan_shards(shapes, dtype=dtype, max_shard_bytes=options.max_shard_bytes)
    with open_directory_atomically(options.save_dir, overwrite=options.overwrite) as partial_dir:
        tokenizer, notes = _export_tokenizer(options, reader, model, partial_dir)
        _write_weights(partial_dir, shards, pairs, model, reader, dtype, on_tensor)
        _verify_weights(partial_dir, shards, pairs, model, reader, dtype, on_tensor)
        num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        _write_descriptions(partial_dir, family, model, reader, dtype, num_parameters, tokenizer)
    return ExportReport(
        save_dir=options.save_dir,
        hf_class=family.hf_class,
        iteration=reader.iteration,
        num_megatron_tensors=len(pairs),
        num_hf_tensors=len(shapes),
        num_parameters=num_parameters,
        num_shards=len(shards),
        dtype=_dtype_name(dtype),
        num_checked_texts=tokenizer.num_checked_texts if tokenizer else 0,
        elapsed_s=time.monotonic() - started_at_s,
        notes=notes,
    )


def _validate_target(options: ExportOptions) -> None:
    if options.save_dir.exists() and not options.overwrite:
        raise ConversionError(
            f"{options.save_dir}: target must not exist yet. Choose another directory, or pass --overwrite."
        )
    is_export = (options.save_dir / "config.json").is_file()
    if options.save_dir.exists() and not is_export and (options.save_dir.is_file() or any(options.save_dir.iterdir())):
        raise ConversionError(
            f"{options.save_dir}: --overwrite replaces an exported model only, got something without config.json. "
            "Choose another directory."
        )


def _select_dtype(requested: str | None, reader: CheckpointReader) -> torch.dtype:
    """The requested dtype, or that of the widest stored tensor."""
    if requested is not None:
        return DTYPES[requested]
    stored = {tensor.dtype for tensor in reader.tensors.values()}
    if unknown := sorted(map(str, stored - set(DTYPES.values()))):
        raise ConversionError(
            f"{reader.directory}: weights must be bf16, fp16 or fp32, got {', '.join(unknown)}. Pass --dtype."
        )
    return max(stored, key=lambda dtype: (dtype.itemsize, str(dtype)))


def _export_tokenizer(
    options: ExportOptions, reader: CheckpointReader, model: Architecture, target_dir: Path
) -> tuple[Any, tuple[str, ...]]:
    """Write the tokenizer's files; returns what was exported (or None) and a note where nothing was."""
    if not options.has_tokenizer:
        return None, ("no tokenizer was written: --no-tokenizer",)
    saved = getattr(reader.args, "tokenizer_model", None)
    path = options.tokenizer_path or (Path(saved) if saved else None)
    if path is None:
        return None, ("no tokenizer was written: the checkpoint names none, and --tokenizer-model was not given",)
    if options.tokenizer_path is None and not path.exists():
        raise ConversionError(
            f"{path}: tokenizer that the checkpoint was trained with does not exist here. "
            "Pass --tokenizer-model, or --no-tokenizer."
        )
    from megatron_hammer.checkpoint.tokenizer_export import export_tokenizer

    tokenizer = export_tokenizer(path, target_dir, max_length=model.max_position_embeddings)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConversionError(
            f"{path}: tokenizer must not have more ids than the model, got {tokenizer.vocab_size} ids, "
            f"vocab_size={model.vocab_size}. Pass the tokenizer that the model was trained with."
        )
    return tokenizer, ()


def _write_weights(
    directory: Path,
    shards: list[Shard],
    pairs: list[TensorPair],
    model: Architecture,
    reader: CheckpointReader,
    dtype: torch.dtype,
    on_tensor: Callable[[str, int, int], None],
) -> None:
    not_finite = []

    def convert() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(pairs, start=1):
            tensor = reader.read(pair.megatron_name).to(dtype)
            if not torch.isfinite(tensor).all():
                not_finite.append(pair.megatron_name)
            yield from zip(pair.hf_names, pair.layout.split(tensor, model), strict=True)
            on_tensor("writing", number, len(pairs))

    write_shards(directory, shards, convert(), dtype=dtype)
    if not_finite:
        raise ConversionError(
            *(
                f"{name}: weights must be finite in {_dtype_name(dtype)}, got NaN or infinity in {reader.directory}. "
                "Export an earlier iteration, or another --dtype."
                for name in not_finite
            )
        )


def _verify_weights(
    directory: Path,
    shards: list[Shard],
    pairs: list[TensorPair],
    model: Architecture,
    reader: CheckpointReader,
    dtype: torch.dtype,
    on_tensor: Callable[[str, int, int], None],
) -> None:
    """Read back every written tensor and merge it to Megatron's: it must equal the source exactly."""
    from safetensors import safe_open

    files = {shard.file_name: safe_open(directory / shard.file_name, framework="pt") for shard in shards}
    file_of = {name: files[shard.file_name] for shard in shards for name in shard.shapes}
    different = []
    for number, pair in enumerate(pairs, start=1):
        merged = pair.layout.merge([file_of[name].get_tensor(name) for name in pair.hf_names], model)
        if not torch.equal(merged, reader.read(pair.megatron_name).to(dtype)):
            different.append(pair.megatron_name)
        on_tensor("verifying", number, len(pairs))
    if different:
        raise ConversionError(
            *(
                f"{name}: what was written must read back equal to the checkpoint, got a difference. "
                "Check the disk; if it is sound, this is a defect of the converter."
                for name in different
            )
        )


def _write_descriptions(
    directory: Path,
    family: Family,
    model: Architecture,
    reader: CheckpointReader,
    dtype: torch.dtype,
    num_parameters: int,
    tokenizer: Any,
) -> None:
    """The model card, generation_config.json and, last, config.json, without which nothing loads."""
    ids = {"bos_id": tokenizer.bos_id if tokenizer else None, "eos_id": tokenizer.eos_id if tokenizer else None}
    card = build_model_card(
        family,
        model,
        args=reader.args,
        iteration=reader.iteration,
        dtype=_dtype_name(dtype),
        num_parameters=num_parameters,
        has_tokenizer=tokenizer is not None,
    )
    (directory / "README.md").write_text(card)
    _write_json(directory / "generation_config.json", build_generation_config(**ids))
    _write_json(directory / "config.json", build_config(family, model, dtype=_dtype_name(dtype), **ids))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
