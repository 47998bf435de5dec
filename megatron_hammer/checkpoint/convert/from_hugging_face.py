"""A Hugging Face folder to a checkpoint that `--load` takes at any layout, verified before it gets its name.

The path: open the folder and compare every name and shape, then tensor by tensor read, merge, write, read back, split
again and compare with the source; then what the whole model computes (verification/verify.py); then the name. Each
tensor is checked while its source is still in memory, so that nothing is read from disk twice. Needs no GPU, process
group or megatron; memory for one tensor.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_hammer.checkpoint.convert.saved_arguments import build_common_state, build_saved_arguments
from megatron_hammer.checkpoint.hugging_face.folder import HfFolder, open_hf_folder
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import TensorLayout
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair
from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.checkpoint.verification.verify_conversion import verify_model
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import extra_state_key, stack_name
from megatron_hammer.checkpoint_files.torch_dist.writer import RELEASE, CheckpointWriter, open_checkpoint_writer
from megatron_hammer.errors import ConversionError, HammerError
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENIZER_DIR = "tokenizer"  # inside the iteration's folder, so that they come and go together
# Weights are cut into boxes of at most this: the box, its source and what is read back are in memory at once.
MAX_CHUNK_BYTES = 256 << 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

Progress = Callable[[int, int], None]
Prove = Callable[[], list[str]]  # returns a sentence for each thing that is wrong


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
    """What was written. num_skipped: tensors of the folder that are copies of others or no weights; `notes` say which.

    tokenizer_dir: None where none was written. checks: what was verified, all of it passed.
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

    Raises HammerError for everything a user can cause; then nothing is left under `save_dir` that was not there before.
    """
    started_at_s = time.monotonic()
    source = open_hf_folder(options.hf_dir)
    dtypes = _select_dtypes(source, options.dtype)
    _require_space(source, dtypes, options.save_dir)
    tokenizer_source, notes = _find_tokenizer(options)
    checks: list[CheckRow] = []
    with open_checkpoint_writer(options.save_dir, iteration=None, overwrite=options.overwrite) as writer:
        tokenizer_dir = None
        if tokenizer_source is not None:
            checks.append(_import_tokenizer(tokenizer_source, writer.directory / TOKENIZER_DIR, source))
            tokenizer_dir = options.save_dir.absolute() / RELEASE / TOKENIZER_DIR
        checks.append(_convert_weights(source, dtypes, writer, on_parameters))
        arguments = build_saved_arguments(
            source.model,
            dtype=_most_frequent_dtype(source, dtypes),
            imported_from=options.hf_dir.absolute().name,
            tokenizer_model=None if tokenizer_dir is None else str(tokenizer_dir),
        )
        writer.commit(build_common_state(arguments))
        checks += _verify_computation(writer.directory, options)
    skipped = source.sources.duplicates.keys() | source.sources.buffers.keys()
    return ImportReport(
        save_dir=options.save_dir,
        model_type=source.model.config["model_type"],
        num_hf_tensors=len(source.weights.shapes),
        num_megatron_tensors=len(source.pairs),
        num_skipped=len(skipped),
        num_parameters=sum(torch.Size(pair.megatron_shape).numel() for pair in source.pairs),
        num_bytes=writer.num_bytes,
        dtype=", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})),
        tokenizer_dir=tokenizer_dir,
        checks=tuple(checks),
        elapsed_s=time.monotonic() - started_at_s,
        notes=(*notes, *_describe_skipped(source)),
    )


# --- before anything is written --------------------------------------------------------------------------------------


def _select_dtypes(source: HfFolder, requested: str | None) -> dict[str, torch.dtype]:
    """The dtype of every key: the requested one, or the narrowest that holds all of its stored parts exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for pair in source.pairs:
        key = stack_name(pair.megatron_name).key
        dtype = DTYPES[requested] if requested else source.pair_dtype(pair)
        dtypes[key] = torch.promote_types(dtypes.get(key, dtype), dtype)
    return dtypes


def _most_frequent_dtype(source: HfFolder, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype of most parameters."""
    counts: dict[torch.dtype, int] = {}
    for pair in source.pairs:
        dtype = dtypes[stack_name(pair.megatron_name).key]
        counts[dtype] = counts.get(dtype, 0) + torch.Size(pair.megatron_shape).numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _require_space(source: HfFolder, dtypes: dict[str, torch.dtype], save_dir: Path) -> None:
    needed_bytes = sum(
        torch.Size(pair.megatron_shape).numel() * dtypes[stack_name(pair.megatron_name).key].itemsize
        for pair in source.pairs
    )
    existing = next(path for path in (save_dir.absolute(), *save_dir.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ConversionError(
            f"{save_dir}: disk must have {needed_bytes:,} bytes free for the weights, got {free_bytes:,}. "
            "Free space, or choose another --save."
        )


def _find_tokenizer(options: ImportOptions) -> tuple[Path | None, tuple[str, ...]]:
    """The tokenizer to copy, and a note where there is none."""
    if not options.has_tokenizer:
        return None, ("no tokenizer was written: --no-tokenizer",)
    if options.tokenizer_path is not None:
        return options.tokenizer_path, ()
    if any((options.hf_dir / name).is_file() for name in _TOKENIZER_FILES):
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
        yield f"{len(names)} buffers were left out, {names[0]} the first: {what}"


# --- weights ---------------------------------------------------------------------------------------------------------


def _convert_weights(
    source: HfFolder, dtypes: dict[str, torch.dtype], writer: CheckpointWriter, on_parameters: Progress
) -> CheckRow:
    """Write and verify every tensor; raises ConversionError naming every one that is not finite or reads back wrong."""
    model = source.model.shape
    num_experts = model.moe.num_experts if model.moe else 0
    axis_sizes = (model.num_layers, num_experts)
    objects = {}
    for pair in source.pairs:
        stacked = stack_name(pair.megatron_name)
        if not any(stacked.indices):  # the first of its stack
            shape = (*axis_sizes[: len(stacked.indices)], *pair.megatron_shape)
            writer.declare(stacked.key, shape, dtypes[stacked.key])
        objects[extra_state_key(pair.megatron_name, num_layers=model.num_layers, num_experts=num_experts)] = [None]
    problems = source.list_unequal_duplicates()
    total = sum(torch.Size(pair.megatron_shape).numel() for pair in source.pairs)
    done = 0
    pending: Future[list[str]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:  # proves one box while the next is written
        for pair in source.pairs:
            for prove in _write_pair(pair, source, dtypes, writer):
                problems += pending.result() if pending else []
                pending = pool.submit(prove)
            done += torch.Size(pair.megatron_shape).numel()
            on_parameters(done, total)
        problems += pending.result() if pending else []
    if problems:
        raise ConversionError(*problems)
    for key, value in objects.items():
        if key is not None:
            writer.write_object(key, value)
    num_parts = sum(len(pair.hf_names) for pair in source.pairs)
    return CheckRow("tensors read back and split again", f"all {num_parts:,} equal, bit for bit", True)


def _write_pair(
    pair: TensorPair, source: HfFolder, dtypes: dict[str, torch.dtype], writer: CheckpointWriter
) -> Iterator[Prove]:
    """Write one Megatron tensor; yields what proves it: finite, and read back and split again what it was made of."""
    stacked = stack_name(pair.megatron_name)
    dtype = dtypes[stacked.key]
    model = source.model.shape
    if _stacks_rows(pair.layout, tuple(shape[0] for shape in pair.hf_shapes), model):
        yield from _write_rows(pair, source, dtype, writer)
        return
    parts = [source.read(name).to(dtype) for name in pair.hf_names]
    offsets = (*stacked.indices, *([0] * len(pair.megatron_shape)))
    _write_box(writer, stacked.key, offsets, len(stacked.indices), pair.layout.merge(parts, model))

    def prove() -> list[str]:
        written = writer.read_chunk(stacked.key, offsets).view(pair.megatron_shape)
        return _list_problems(pair, pair.hf_names, parts, pair.layout.split(written, model), source, writer)

    yield prove


@functools.lru_cache(maxsize=64)
def _stacks_rows(layout: TensorLayout, part_rows: tuple[int, ...], model: ModelShape) -> bool:
    """Whether the layout puts its parts one under the other, tried on numbered matrices of three columns."""
    numbers = torch.arange(3 * sum(part_rows)).view(-1, 3)
    try:
        merged = layout.merge(numbers.split(part_rows), model)
    except ConversionError:  # of a layout whose parts lie across
        return False
    return torch.equal(merged, numbers)


def _write_rows(pair: TensorPair, source: HfFolder, dtype: torch.dtype, writer: CheckpointWriter) -> Iterator[Prove]:
    """The same where the parts lie one under the other: nothing is copied, and what is large goes box by box."""
    stacked = stack_name(pair.megatron_name)
    num_stacked, row = len(stacked.indices), 0
    for name in pair.hf_names:
        for piece in _split_rows(source.read(name), dtype):
            part = piece.to(dtype)
            offsets = (*stacked.indices, row, *([0] * (part.dim() - 1)))
            _write_box(writer, stacked.key, offsets, num_stacked, part)
            yield functools.partial(_prove_rows, pair, name, part, offsets, source, writer)
            row += len(part)


def _prove_rows(
    pair: TensorPair,
    name: str,
    part: Tensor,
    offsets: Sequence[int],
    source: HfFolder,
    writer: CheckpointWriter,
) -> list[str]:
    written = writer.read_chunk(stack_name(pair.megatron_name).key, offsets).view(part.shape)
    return _list_problems(pair, [name], [part], [written], source, writer)


def _split_rows(tensor: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Views of at most MAX_CHUNK_BYTES each, or of one row that is larger."""
    row_bytes = max(1, tensor[0].numel() * max(dtype.itemsize, tensor.dtype.itemsize))
    return tensor.split(max(1, MAX_CHUNK_BYTES // row_bytes))


def _write_box(writer: CheckpointWriter, key: str, offsets: Sequence[int], num_stacked: int, tensor: Tensor) -> None:
    writer.write_chunk(key, offsets, tensor.reshape((1,) * num_stacked + tensor.shape))


def _list_problems(
    pair: TensorPair,
    names: Sequence[str],
    parts: Sequence[Tensor],
    written: Sequence[Tensor],
    source: HfFolder,
    writer: CheckpointWriter,
) -> list[str]:
    problems = []
    for name, part, copy in zip(names, parts, written, strict=True):
        if not is_finite(part):
            problems.append(
                f"{name}: weights must be finite in {str(part.dtype).removeprefix('torch.')}, got NaN or infinity in "
                f"{source.folder}. Fetch the folder again, or pass another --dtype."
            )
        if not is_bitwise_equal(part, copy):
            problems.append(
                f"{name}: what was written as {pair.megatron_name} must read back equal, got a difference in "
                f"{writer.directory}. Check the disk; if it is sound, this is a defect of the converter."
            )
    return problems


# --- the whole model and its tokenizer -------------------------------------------------------------------------------


def _verify_computation(partial_dir: Path, options: ImportOptions) -> list[CheckRow]:
    if options.verify == "tensors":
        return [CheckRow("Megatron against transformers", "not compared: --verify tensors", None)]
    checks = verify_model(partial_dir, options.hf_dir, level=options.verify)
    failed = [
        f"{options.hf_dir}: Megatron must compute from the checkpoint what transformers computes from the folder, "
        f"got {check.check}: {check.result}. Nothing was written; report it if the folder works in transformers."
        for check in checks
        if check.is_passed is False
    ]
    if failed:
        raise ConversionError(*failed)
    return checks


def _import_tokenizer(source_path: Path, target_dir: Path, source: HfFolder) -> CheckRow:
    """Copy the tokenizer, compared through transformers. Raises HammerError if it cannot be copied exactly."""
    try:
        exported = export_tokenizer_folder(source_path, target_dir)
    except HammerError as error:
        raise type(error)(*(f"{problem} Or pass --no-tokenizer." for problem in error.problems)) from error
    num_ids, vocab_size = exported.tokenizer.vocab_size, source.model.shape.vocab_size
    if num_ids > vocab_size:
        raise ConversionError(
            f"{source_path}: tokenizer must not have more ids than the model, got {num_ids} ids, "
            f"vocab_size={vocab_size}. Pass the tokenizer of the model with --tokenizer-model, or --no-tokenizer."
        )
    texts = exported.samples
    result = f"{texts.num_documents:,} texts, {texts.num_tokens:,} tokens equal in transformers"
    return CheckRow("tokenizer copied", result, True)
