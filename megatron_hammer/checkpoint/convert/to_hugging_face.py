"""Converts a Megatron checkpoint to a complete Hugging Face folder, verified before it is published.

The path: open the checkpoint, choose the family, compare every name and shape, move every tensor and prove it
(weight_export.py), compare what both models compute (verification/verify_conversion.py), rename the folder into place.
A failure leaves nothing. config.json is written last, so that after a kill the partial folder does not load.
"""

import functools
import json
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.checkpoint.convert.carried_fields import (
    CarriedFields,
    find_descriptions,
    select_carried,
)
from megatron_hammer.checkpoint.convert.exported_vocabulary import select_vocabulary
from megatron_hammer.checkpoint.convert.proofs import (
    DTYPES,
    require_free_space,
    require_ids_in_vocabulary,
    require_passed,
)
from megatron_hammer.checkpoint.convert.weight_export import write_verified_weights
from megatron_hammer.checkpoint.hugging_face.config_json import GENERATION_NAME, build_config, build_generation_config
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import Family, expand
from megatron_hammer.checkpoint.hugging_face.model_card import MODEL_CARD_NAME, build_model_card
from megatron_hammer.checkpoint.hugging_face.plain_norms import PlainNormReader
from megatron_hammer.checkpoint.hugging_face.saved_model import (
    has_zero_centered_norms,
    read_saved_dropout,
    read_saved_model,
)
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair, validate_names_and_shapes
from megatron_hammer.checkpoint.verification.verify_conversion import CheckRow, Level, verify_model
from megatron_hammer.checkpoint_files.checkpoint_reader import VOCABULARY_TENSORS, CheckpointReader, name_dtype
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.safetensors.shard_writer import ShardFile, plan_shards
from megatron_hammer.checkpoint_files.saved_arguments import find_saved_tokenizer
from megatron_hammer.checkpoint_files.torch_dist.reader import TorchDistReader
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.publish import OWN_MARK, publish_directory, require_result_folder
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.tokenizer.encoding.special_tokens import read_config
from megatron_hammer.tokenizer.export.chat_format import ChatFormat, write_chat_format

LARGEST_SHARD_GB = 1e6
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000  # of transformers 4; version 5 writes shards of up to 50 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """dtype: a key of DTYPES, or None for the stored one. tokenizer_path: None for the one the checkpoint names.

    vocab_size: None for the checkpoint's. has_tokenizer: False leaves the tokenizer's files out. weights: "model", or
    "master" for the optimizer's fp32 copies. verify: how far the models are compared after their tensors have been.
    ignored_arguments: saved arguments that this package does not know and that do not change the computation.
    find_chat: is given the tokenizer's path and the saved arguments, and returns how the model chats, if it does.
    """

    load_dir: Path
    save_dir: Path
    iteration: int | None = None
    weights: str = "model"
    tokenizer_path: Path | None = None
    has_tokenizer: bool = True
    vocab_size: int | None = None
    dtype: str | None = None
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    verify: Level = "auto"
    ignored_arguments: tuple[str, ...] = ()
    overwrite: bool = False
    find_chat: Callable[[Path, Namespace], ChatFormat | None] = lambda path, args: None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written and every check of it; `notes` are sentences about what was left out."""

    save_dir: Path
    hf_class: str
    iteration: int
    weights: str
    num_megatron_tensors: int
    num_hf_tensors: int
    num_parameters: int
    num_bytes: int
    num_shards: int
    dtype: str
    num_checked_texts: int
    checks: tuple[CheckRow, ...]
    elapsed_s: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Everything that is known before the first tensor is converted."""

    reader: CheckpointReader
    model: ModelShape
    family: Family
    pairs: list[TensorPair]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    shards: list[ShardFile]
    num_parameters: int
    num_compared_files: int
    tokenizer_path: Path | None
    carried: CarriedFields | None
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.count_bytes(name) for shard in self.shards for name in shard.shapes)

    @property
    def dtype_name(self) -> str:
        return name_dtype(self.dtype)


def export_to_hugging_face(
    options: ExportOptions, on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> ExportReport:
    """Convert a checkpoint; `on_progress(stage, done, total)` is told of every tensor converted and every stage.

    Raises HammerError for every error of a user; then nothing is left under `save_dir` or beside it.
    """
    started_at_s = time.monotonic()
    _validate_target(options)
    plan = _plan_export(options)
    require_free_space(options.save_dir, plan.num_bytes)
    with publish_directory(options.save_dir, overwrite=options.overwrite, sources=[options.load_dir]) as partial_dir:
        tokenizer, notes = _export_tokenizer(options, plan, partial_dir, on_progress)
        config = _write_descriptions(partial_dir, plan, tokenizer)
        write_verified_weights(
            partial_dir,
            plan.shards,
            plan.pairs,
            plan.model,
            plan.reader,
            plan.dtype,
            lambda done, total: on_progress("tensors", done, total),
        )
        checks = [
            *_describe_checks(plan, tokenizer),
            *_compare_tokenizers(tokenizer, partial_dir, config),
            *_compare_models(options, partial_dir, config, on_progress),
        ]
        # Last: what differs from the original tokenizer on purpose must not be compared with it.
        chat_checks, chat_notes = _write_chat_format(options, plan, partial_dir)
        (partial_dir / "config.json").write_text(config)
    return ExportReport(
        save_dir=options.save_dir,
        hf_class=plan.family.hf_class,
        iteration=plan.reader.iteration,
        weights=options.weights,
        num_megatron_tensors=len(plan.pairs),
        num_hf_tensors=len(plan.shapes),
        num_parameters=plan.num_parameters,
        num_bytes=plan.num_bytes,
        num_shards=len(plan.shards),
        dtype=plan.dtype_name,
        num_checked_texts=tokenizer.num_checked_texts if tokenizer else 0,
        checks=(*checks, *chat_checks),
        elapsed_s=time.monotonic() - started_at_s,
        notes=(*notes, *plan.notes, *_describe_norms(plan), *chat_notes),
    )


def _plan_export(options: ExportOptions) -> _Plan:
    """Open the checkpoint and compare its names, shapes and dtypes with its model; converts no tensor."""
    reader = open_checkpoint(options.load_dir, iteration=options.iteration, weights=options.weights)
    tokenizer_path = options.tokenizer_path or _find_own_tokenizer(options, reader)
    vocabulary = select_vocabulary(reader.args, asked=options.vocab_size, tokenizer_path=tokenizer_path)
    model = read_saved_model(reader.args, vocab_size=vocabulary.num_tokens, ignored=options.ignored_arguments)
    embedding = reader.tensors.get(VOCABULARY_TENSORS[0])  # where there is none, the comparison of names says so
    notes = [] if embedding is None else [*vocabulary.describe(embedding.shape[0])]
    source = find_descriptions(reader.saved_args, reader.directory)
    carried = None if source is None else select_carried(source, vocab_size=model.vocab_size)
    family = select_family(model, preferred=None if source is None else source.config.get("model_type"))
    pairs = expand(family, model)
    reader.remove_vocab_padding(model.vocab_size)
    validate_names_and_shapes(
        {pair.megatron_name: pair.megatron_shape for pair in pairs},
        {name: stored.shape for name, stored in reader.tensors.items()},
        where=str(reader.directory),
    )
    num_compared_files = reader.validate_one_save() if isinstance(reader, TorchDistReader) else 0
    # Buffers are in fp32 always.
    stored = {reader.tensors[pair.megatron_name].dtype for pair in pairs if not pair.is_buffer}
    dtype = _select_dtype(options.dtype, stored, where=reader.directory)
    if has_zero_centered_norms(reader.args):
        reader = PlainNormReader(reader)
    shapes = {name: shape for pair in pairs for name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)}
    return _Plan(
        reader=reader,
        model=model,
        family=family,
        pairs=pairs,
        shapes=shapes,
        dtype=dtype,
        num_compared_files=num_compared_files,
        tokenizer_path=tokenizer_path if options.has_tokenizer else None,
        carried=carried,
        notes=(*notes, *_describe_dtypes(options.dtype, stored, dtype), *(carried.notes if carried else ())),
        shards=plan_shards(
            shapes,
            dtype=dtype,
            max_shard_bytes=options.max_shard_bytes,
            fp32_names=[name for pair in pairs if pair.is_buffer for name in pair.hf_names],
        ),
        num_parameters=sum(pair.num_elements for pair in pairs if not pair.is_buffer),
    )


def _validate_target(options: ExportOptions) -> None:
    if options.save_dir.exists() and not options.overwrite:
        raise ConversionError(
            f"{options.save_dir}: target must not exist yet. Choose another directory, or pass --overwrite."
        )
    from megatron_hammer.tokenizer.export.export_tokenizer import CHAT_TEMPLATES_DIR, HF_TOKENIZER_FILES

    # Neither the model that training began with nor a folder of other things is an export.
    names = ("config.json", GENERATION_NAME, MODEL_CARD_NAME, CHAT_TEMPLATES_DIR, *HF_TOKENIZER_FILES)
    exported = "|".join((*map(re.escape, names), r"model.*\.safetensors", r"model\.safetensors\.index\.json"))
    require_result_folder(options.save_dir, MODEL_CARD_NAME, mark=OWN_MARK, holds_only=exported)


def _describe_norms(plan: _Plan) -> Iterator[str]:
    if isinstance(plan.reader, PlainNormReader) and plan.dtype != torch.float32:
        yield (
            f"weights of norms are the stored ones + 1 (--apply-layernorm-1p), rounded to {plan.dtype_name}; "
            "--dtype fp32 rounds nothing"
        )


def _select_dtype(requested: str | None, stored: Set[torch.dtype], *, where: Path) -> torch.dtype:
    """The requested dtype, or the narrowest that holds every parameter exactly: fp32 for bf16 and fp16 together."""
    if requested is not None:
        return DTYPES[requested]
    if unknown := sorted(map(str, stored - set(DTYPES.values()))):
        raise ConversionError(f"{where}: weights must be bf16, fp16 or fp32, got {', '.join(unknown)}. Pass --dtype.")
    return functools.reduce(torch.promote_types, stored)


def _describe_dtypes(requested: str | None, stored: Set[torch.dtype], dtype: torch.dtype) -> list[str]:
    """A sentence where a folder with one dtype is made of a checkpoint with several."""
    if requested is not None or len(stored) == 1:
        return []
    return [
        f"weights are stored in {' and '.join(sorted(map(name_dtype, stored)))}; all were written in "
        f"{name_dtype(dtype)}, which changes no value. --dtype bf16 writes all of them in 16 bits"
    ]


def _export_tokenizer(
    options: ExportOptions, plan: _Plan, target_dir: Path, on_progress: Callable[[str, int, int], None]
) -> tuple[Any, tuple[str, ...]]:
    """Write the tokenizer's files; returns what was exported (or None), and a note where nothing or otherwise was."""
    if not options.has_tokenizer:
        return None, ("no tokenizer was written: --no-tokenizer",)
    path = plan.tokenizer_path
    if path is None:
        return None, ("no tokenizer was written: the checkpoint names none, and --tokenizer-model was not given",)
    from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer

    on_progress("tokenizer", 0, 1)
    tokenizer = export_tokenizer(path, target_dir, max_length=plan.model.max_position_embeddings)
    require_ids_in_vocabulary(
        path,
        num_ids=tokenizer.vocab_size,
        vocab_size=plan.model.vocab_size,
        remedy="Pass the tokenizer that the model was trained with.",
    )
    on_progress("tokenizer", 1, 1)
    return tokenizer, () if tokenizer.note is None else (tokenizer.note,)


def _write_chat_format(
    options: ExportOptions, plan: _Plan, directory: Path
) -> tuple[tuple[CheckRow, ...], tuple[str, ...]]:
    """Add the chat template, and let generation stop at the end of a turn; returns what was compared, and notes."""
    chat = None if plan.tokenizer_path is None else options.find_chat(plan.tokenizer_path, plan.reader.args)
    if chat is None:
        return (), ()
    notes = write_chat_format(directory, chat)
    generation = read_config(directory / GENERATION_NAME)
    ends = generation.get("eos_token_id", [])
    stops = sorted({*(ends if isinstance(ends, list) else [ends]), *chat.end_of_turn_ids})
    (directory / GENERATION_NAME).write_text(_format_json(generation | {"eos_token_id": stops}))
    num_conversations = chat.check(directory)
    result = f"{num_conversations} conversations have the same ids and masks in transformers"
    return (CheckRow("chat template", result, True),) if num_conversations else (), notes


def _find_own_tokenizer(options: ExportOptions, reader: CheckpointReader) -> Path | None:
    """The checkpoint's tokenizer, which must be there unless its files are left out."""
    saved = getattr(reader.args, "tokenizer_model", None)
    path = find_saved_tokenizer(reader.args, reader.directory)
    if saved and path is None and options.has_tokenizer:
        raise ConversionError(
            f"{saved}: tokenizer that the checkpoint was trained with does not exist here. "
            "Pass --tokenizer-model, or --no-tokenizer."
        )
    return path


def _write_descriptions(directory: Path, plan: _Plan, tokenizer: Any) -> str:
    """Write the model card and generation_config.json; returns what belongs into config.json.

    Where the model began as a Hugging Face folder, both files say what they said there beside the architecture.
    """
    ids = {"bos_id": tokenizer.bos_id if tokenizer else None, "eos_id": tokenizer.eos_id if tokenizer else None}
    card = build_model_card(
        plan.family,
        plan.model,
        args=plan.reader.args,
        iteration=plan.reader.iteration,
        dtype=plan.dtype_name,
        num_parameters=plan.num_parameters,
        has_tokenizer=tokenizer is not None,
    )
    (directory / MODEL_CARD_NAME).write_text(card)
    generation = build_generation_config(**ids) if plan.carried is None else plan.carried.generation
    if generation is not None:
        (directory / GENERATION_NAME).write_text(_format_json(generation))
    dropout = read_saved_dropout(plan.reader.args)
    config = build_config(plan.family, plan.model, dropout, dtype=plan.dtype_name, **ids)
    if plan.carried is not None:
        # The source's own, or where it had none, the default of its class; the tokenizer's may be another.
        for name in ("bos_token_id", "eos_token_id", "use_cache"):
            del config[name]
        config = {**plan.carried.config, **config}
    return _format_json(config)


def _format_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _describe_checks(plan: _Plan, tokenizer: Any) -> list[CheckRow]:
    """What has been proved once every weight is written; a failed proof has raised an error before."""
    rows = []
    if plan.num_compared_files:
        result = f"weights are the rounded fp32 copies in other files: {plan.num_compared_files} pairs of files"
        rows.append(CheckRow("files of one save", result, True))
    num = len(plan.pairs)
    rows.append(CheckRow("tensors", f"{num} of {num} read back from the files bit for bit, all finite", True))
    if tokenizer is None:
        return [*rows, CheckRow("tokenizer", "none was written", None)]
    if not tokenizer.num_checked_texts:
        return rows
    texts = f"{tokenizer.num_checked_texts:,} of {tokenizer.num_checked_texts:,} texts encode to the original's ids"
    return [*rows, CheckRow("tokenizer", texts, True)]


def _compare_tokenizers(tokenizer: Any, partial_dir: Path, config: str) -> Iterator[CheckRow]:
    """Load the tokenizer as a user will, beside the model's config.json, which may change its class."""
    if tokenizer is None or tokenizer.copied_from is None:
        return
    from megatron_hammer.tokenizer.export.check_loading import pin_tokenizer, require_loaded_alike

    source = tokenizer.copied_from
    try:
        with _link_complete(partial_dir, config) as linked_dir:
            num_facts = require_loaded_alike(source, linked_dir)
    # The copied files do not load alike beside this config.json, whose model_type may be another than the original's.
    except ConversionError:
        pin_tokenizer(source, partial_dir)
        with _link_complete(partial_dir, config) as linked_dir:
            num_facts = require_loaded_alike(source, linked_dir)
    what = "special and added tokens, chat template, ids of texts"
    result = f"{num_facts} facts equal the original's ({what})"
    if num_facts is None:
        result = "not compared: the original alone names no class of transformers"
    yield CheckRow("tokenizer in transformers", result, None if num_facts is None else True)


@contextmanager
def _link_complete(partial_dir: Path, config: str) -> Iterator[Path]:
    """A folder of links to `partial_dir` that has its own config.json, so that the partial folder never loads."""
    with tempfile.TemporaryDirectory(prefix="megatron_hammer_") as name:
        linked_dir = Path(name) / "model"
        linked_dir.mkdir()
        # Links: the weights are not copied.
        for path in partial_dir.iterdir():
            (linked_dir / path.name).symlink_to(path.absolute())
        (linked_dir / "config.json").write_text(config)
        yield linked_dir


def _compare_models(
    options: ExportOptions, partial_dir: Path, config: str, on_progress: Callable[[str, int, int], None]
) -> Sequence[CheckRow]:
    """Let Megatron and transformers compute the same; raises ConversionError with a sentence for every failed check."""
    if options.verify == "tensors":
        return [CheckRow("Megatron against transformers", "not compared: --verify tensors", None)]
    on_progress("computing with both models", 0, 1)
    with _link_complete(partial_dir, config) as linked_dir:
        rows = verify_model(
            options.load_dir,
            linked_dir,
            level=options.verify,
            iteration=options.iteration,
            weights=options.weights,
        )
    require_passed(
        rows,
        requirement=f"{options.load_dir}: transformers must compute what Megatron does",
        consequence="Nothing was written; this is a defect of the mapping, and --verify tensors exports all the same.",
    )
    on_progress("computing with both models", 1, 1)
    return rows
