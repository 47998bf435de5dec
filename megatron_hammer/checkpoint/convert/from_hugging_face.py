"""Converts a Hugging Face folder to a checkpoint that `--load` takes at any layout; verified before it is published.

The path: open the folder and compare every name and shape, move every tensor and prove it (weight_import.py), compare
what both models compute (verification/verify_conversion.py), rename the result into place. Needs no GPU, process group
or megatron; memory for one tensor.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_hammer.checkpoint.convert.carried_fields import copy_descriptions, require_descriptions
from megatron_hammer.checkpoint.convert.proofs import (
    DTYPES,
    require_free_space,
    require_ids_in_vocabulary,
    require_passed,
)
from megatron_hammer.checkpoint.convert.saved_arguments import build_common_state, build_saved_arguments
from megatron_hammer.checkpoint.convert.weight_import import write_verified_weights
from megatron_hammer.checkpoint.hugging_face.folder import HfFolder, open_hf_folder
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair
from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.checkpoint.verification.verify_conversion import most_frequent_dtype, verify_model
from megatron_hammer.checkpoint_files.checkpoint_reader import RELEASE, name_dtype
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import stack_name
from megatron_hammer.checkpoint_files.torch_dist.writer import open_checkpoint_writer
from megatron_hammer.errors import HammerError
from megatron_hammer.files.read import is_present
from megatron_hammer.tokenizer.encoding.encoder import hash_tokenizer

TOKENIZER_DIR = "tokenizer"  # inside the iteration's folder, so that they come and go together
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """dtype: a key of DTYPES, or None for the stored one. tokenizer_path: None for the one in the folder, if any.

    has_tokenizer: False leaves it out. verify: as `verify_model` takes it; every tensor is always compared.
    """

    hf_dir: Path
    save_dir: Path
    dtype: str | None = None
    tokenizer_path: Path | None = None
    has_tokenizer: bool = True
    verify: Literal["auto", "logits", "layers", "tensors"] = "auto"
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What was written. num_skipped: tensors that are copies of others or buffers; `notes` name them.

    tokenizer_dir: None if no tokenizer was written. checks: what was verified; all of it passed.
    """

    save_dir: Path
    model_type: str
    num_hf_tensors: int
    num_megatron_tensors: int
    num_skipped: int
    num_parameters: int
    num_bytes: int
    dtype: str
    tokenizer_dir: Path | None
    checks: tuple[CheckRow, ...]
    elapsed_s: float
    notes: tuple[str, ...]


def import_from_hugging_face(
    options: ImportOptions, on_parameters: Progress = lambda done, total: None
) -> ImportReport:
    """Convert a folder; `on_parameters(done, total)` is told how many are written and verified.

    Raises HammerError for every error of a user; then `save_dir` holds what it held before.
    """
    started_at_s = time.monotonic()
    source = open_hf_folder(options.hf_dir)
    require_descriptions(options.hf_dir)
    dtypes = _select_dtypes(source, options.dtype)
    needed_bytes = sum(pair.num_elements * dtypes[_key_of(pair, source)].itemsize for pair in source.pairs)
    require_free_space(options.save_dir, needed_bytes)
    tokenizer_source, notes = _find_tokenizer(options)
    checks: list[CheckRow] = []
    with open_checkpoint_writer(
        options.save_dir, iteration=None, overwrite=options.overwrite, sources=[options.hf_dir]
    ) as writer:
        tokenizer_dir = tokenizer_sha256 = None
        if tokenizer_source is not None:
            # Before the weights, which take much longer: a tokenizer that does not fit ends the command early.
            tokenizer_check, tokenizer_note = _import_tokenizer(
                tokenizer_source, writer.directory / TOKENIZER_DIR, source
            )
            checks.append(tokenizer_check)
            notes += () if tokenizer_note is None else (tokenizer_note,)
            tokenizer_sha256 = hash_tokenizer(writer.directory / TOKENIZER_DIR)
            # The final place: the folder is renamed after the arguments, which name it, are written.
            tokenizer_dir = options.save_dir.absolute() / RELEASE / TOKENIZER_DIR
        checks.append(write_verified_weights(source, dtypes, writer, on_parameters))
        arguments = build_saved_arguments(
            source.model,
            dtype=most_frequent_dtype((dtypes[_key_of(pair, source)], pair.num_elements) for pair in source.pairs),
            imported_from=options.hf_dir.absolute().name,
            tokenizer_model=None if tokenizer_dir is None else str(tokenizer_dir),
            tokenizer_sha256=tokenizer_sha256,
        )
        copy_descriptions(options.hf_dir, writer.directory)
        writer.commit(build_common_state(arguments))
        # Before the rename: a checkpoint that computes something else never gets its name.
        checks += _verify_computation(writer.directory, options)
    written = {dtypes[_key_of(pair, source)] for pair in source.pairs if not pair.is_buffer}
    skipped = source.sources.duplicates.keys() | source.sources.buffers.keys()
    return ImportReport(
        save_dir=options.save_dir,
        model_type=source.model.config["model_type"],
        num_hf_tensors=len(source.weights.shapes),
        num_megatron_tensors=len(source.pairs),
        num_skipped=len(skipped),
        num_parameters=sum(pair.num_elements for pair in source.pairs if not pair.is_buffer),
        num_bytes=writer.num_bytes,
        dtype=", ".join(sorted({name_dtype(dtype) for dtype in written})),
        tokenizer_dir=tokenizer_dir,
        checks=tuple(checks),
        elapsed_s=time.monotonic() - started_at_s,
        notes=(*notes, *_describe_skipped(source)),
    )


# --- before anything is written --------------------------------------------------------------------------------------


def _select_dtypes(source: HfFolder, requested: str | None) -> dict[str, torch.dtype]:
    """The dtype of every key: the requested one, or the narrowest dtype that holds all stored parts exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for pair in source.pairs:
        # Several layers can share one key, and a key is stored in one dtype. promote_types(bf16, fp16) is fp32,
        # the narrowest that holds both exactly.
        key = _key_of(pair, source)
        dtype = DTYPES[requested] if requested else source.pair_dtype(pair)
        if pair.is_buffer:
            dtype = torch.float32
        dtypes[key] = torch.promote_types(dtypes.get(key, dtype), dtype)
    return dtypes


def _key_of(pair: TensorPair, source: HfFolder) -> str:
    return stack_name(pair.megatron_name, has_layer_axis=not source.model.shape.is_mixed).key


def _find_tokenizer(options: ImportOptions) -> tuple[Path | None, tuple[str, ...]]:
    """The tokenizer to copy, and a note where there is none."""
    if not options.has_tokenizer:
        return None, ("no tokenizer was written: --no-tokenizer",)
    if options.tokenizer_path is not None:
        return options.tokenizer_path, ()
    if any(is_present(options.hf_dir / name) for name in _TOKENIZER_FILES):
        return options.hf_dir, ()
    return None, (
        f"no tokenizer was written: {options.hf_dir} holds neither {' nor '.join(_TOKENIZER_FILES)}, and "
        "--tokenizer-model was not given",
    )


def _describe_skipped(source: HfFolder) -> Iterator[str]:
    for name, twin in sorted(source.sources.duplicates.items()):
        yield f"{name} was left out: it is a copy of {twin}, to which config.json ties it"
    for what in sorted(set(source.sources.buffers.values())):
        names = sorted(name for name, kind in source.sources.buffers.items() if kind == what)
        yield f"{len(names)} tensors were left out, {names[0]} the first: {what}"


# --- the whole model and its tokenizer -------------------------------------------------------------------------------


def _verify_computation(partial_dir: Path, options: ImportOptions) -> list[CheckRow]:
    if options.verify == "tensors":
        return [CheckRow("Megatron against transformers", "not compared: --verify tensors", None)]
    checks = verify_model(partial_dir, options.hf_dir, level=options.verify)
    require_passed(
        checks,
        requirement=f"{options.hf_dir}: Megatron must compute from the checkpoint what transformers computes from the "
        "folder",
        consequence="Nothing was written; report it if the folder works in transformers.",
    )
    return checks


def _import_tokenizer(source_path: Path, target_dir: Path, source: HfFolder) -> tuple[CheckRow, str | None]:
    """Copy the tokenizer, compared through transformers; returns what was compared, and what a user should know.

    Raises HammerError if it cannot be copied exactly.
    """
    from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer_folder

    try:
        exported = export_tokenizer_folder(source_path, target_dir)
    except HammerError as error:
        # The class stays, because callers may catch it; only the remedy grows.
        raise type(error)(*(f"{problem} Or pass --no-tokenizer." for problem in error.problems)) from error
    num_ids, vocab_size = exported.tokenizer.vocab_size, source.model.shape.vocab_size
    require_ids_in_vocabulary(
        source_path,
        num_ids=num_ids,
        vocab_size=vocab_size,
        remedy="Pass the tokenizer of the model with --tokenizer-model, or --no-tokenizer.",
    )
    texts = exported.samples
    result = f"{texts.num_documents:,} texts, {texts.num_tokens:,} tokens equal in transformers"
    return CheckRow("tokenizer copied", result, True), exported.tokenizer.note
