"""Converts a Hugging Face folder or a Megatron checkpoint to one GGUF file, and lets llama.cpp itself check it.

The path: read config.json, choose llama.cpp's arch, name every tensor, read the tokenizer, write `<out>.partial` in one
pass, read it back, let llama.cpp load it and compare its tokens and logits, rename. A failure leaves nothing.
"""

import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES

from megatron_hammer.checkpoint.gguf.experts import read_stacks
from megatron_hammer.checkpoint.gguf.file_types import FILE_TYPES, FLOAT_DTYPES, load_quantizer
from megatron_hammer.checkpoint.gguf.gguf_file import verify_gguf, write_gguf
from megatron_hammer.checkpoint.gguf.header import MAGIC
from megatron_hammer.checkpoint.gguf.metadata import build_metadata, list_extra_tensors, list_unwritten, require_end
from megatron_hammer.checkpoint.gguf.tensors import GgufTensor, plan_tensors, select_architecture
from megatron_hammer.checkpoint.gguf.tokenizer import GgufVocabulary, read_vocabulary
from megatron_hammer.checkpoint.gguf.verification import GgufProof, explain_absence, verify_with_llama_cpp
from megatron_hammer.checkpoint.hugging_face.config_json import (
    CONFIG_NAME,
    GENERATION_NAME,
    HfModel,
    read_config,
    read_hf_model,
)
from megatron_hammer.checkpoint.hugging_face.folder import HfFolder, open_hf_folder
from megatron_hammer.checkpoint.hugging_face.tensor_sources import HF_BUFFER_ENDINGS
from megatron_hammer.checkpoint.verification.verify_conversion import CheckRow
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.publish import publish_path
from megatron_hammer.files.read import is_present
from megatron_hammer.tokenizer.export.chat_format import ChatFormat

OnStep = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufOptions:
    """load_dir: a Hugging Face folder or what training saved. file_type: a key of FILE_TYPES.

    iteration, tokenizer_path, find_chat: of a Megatron checkpoint, as in ExportOptions. name: what llama.cpp shows;
    None for the folder's. corpus: files of documents that both tokenizers must encode alike; text_key: their field.
    """

    load_dir: Path
    save_path: Path
    file_type: str = "f16"
    iteration: int | None = None
    tokenizer_path: Path | None = None
    name: str | None = None
    is_verified: bool = True
    corpus: tuple[str, ...] = ()
    text_key: str = "text"
    find_chat: Callable[[Path, Namespace], ChatFormat | None] = lambda path, args: None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufReport:
    """What was written. types: tensors by type; checks: what was proved; notes: what was left out or fell back.

    examples: some of the texts that llama.cpp encodes in another way, with the cause.
    """

    save_path: Path
    arch: str
    file_type: str
    num_tensors: int
    num_parameters: int
    file_bytes: int
    types: dict[str, int]
    checks: tuple[CheckRow, ...]
    examples: tuple[str, ...]
    notes: tuple[str, ...]
    elapsed_s: float


def export_to_gguf(options: GgufOptions, on_step: OnStep = lambda stage, done, total: None) -> GgufReport:
    """Convert a model; `on_step(stage, done, total)` is told of tensors written and verified and of texts compared.

    Raises HammerError for every error of a user; then nothing is left at `save_path` or beside it.
    """
    started_at_s = time.monotonic()
    _validate_options(options)
    with _open_hugging_face(options, on_step) as hf_dir, publish_path(options.save_path) as partial_path:
        model = read_hf_model(hf_dir)
        file_type = FILE_TYPES[options.file_type]
        arch = MODEL_ARCH_NAMES[select_architecture(model)]
        tensors = plan_tensors(model, file_type)
        source = open_hf_folder(hf_dir)
        # Only one copy of tied tensors is written, so copies that differ would lose one.
        if problems := source.list_unequal_duplicates():
            raise ConversionError(*problems)
        generation_path = hf_dir / GENERATION_NAME
        vocabulary = read_vocabulary(
            hf_dir,
            vocab_size=model.shape.vocab_size,
            config=model.config,
            generation=read_config(generation_path) if is_present(generation_path) else None,
        )
        require_end(vocabulary)
        name = options.name or options.load_dir.resolve().name
        writer = build_metadata(model.shape, vocabulary, arch=arch, file_type=options.file_type, name=name)
        extras = list_extra_tensors(model.shape)
        total = len(tensors)
        read = read_stacks(source.read, model.shape.moe)
        write_gguf(partial_path, writer, extras, tensors, read, lambda done: on_step("writing tensors", done, total))
        verify_gguf(partial_path, extras, tensors, read, lambda done: on_step("verifying tensors", done, total))
        parameters = (tensor for tensor in tensors if not tensor.hf_name.endswith(HF_BUFFER_ENDINGS))
        num_parameters = sum(math.prod(tensor.shape) for tensor in parameters)
        proof = _prove(options, partial_path, hf_dir, model, vocabulary, num_parameters, on_step)
        checks = (CheckRow("tensors", f"{total} read back, {_describe_exactness(tensors)}", True), *proof.rows)
        # Inside `publish_path`: an error here removes the partial file.
        if failed := [row for row in checks if row.is_passed is False]:
            raise ConversionError(
                *(
                    f"{options.save_path}: {row.check} must agree, got {row.result}. Nothing was written."
                    for row in failed
                )
            )
        file_bytes = partial_path.stat().st_size  # after the block it has its final name
    return GgufReport(
        save_path=options.save_path,
        arch=arch,
        file_type=options.file_type,
        num_tensors=total + len(extras),
        num_parameters=num_parameters,
        file_bytes=file_bytes,
        types=dict(Counter(tensor.type.name.lower() for tensor in tensors)),
        checks=checks,
        examples=proof.examples,
        notes=(*_list_left_out(source), *list_unwritten(vocabulary), *_list_fallbacks(tensors, options.file_type)),
        elapsed_s=time.monotonic() - started_at_s,
    )


def _validate_options(options: GgufOptions) -> None:
    if options.file_type not in FILE_TYPES:
        raise ConversionError(
            f"type: must be one of {', '.join(FILE_TYPES)}, got {options.file_type}. "
            "Others need an importance matrix; make them with llama-quantize."
        )
    if FILE_TYPES[options.file_type].needs_llama_cpp:
        # Called for its error only: without it, a missing library would be noticed after tensors are written.
        load_quantizer()
    if options.save_path.is_dir():
        raise ConversionError(f"{options.save_path}: must be a file to write, got a folder. Add a name, as model.gguf.")
    if options.save_path.exists() and not options.overwrite:
        raise ConversionError(
            f"{options.save_path}: target must not exist yet. Choose another name, or pass --overwrite."
        )
    # A typing error in --save together with --overwrite must not destroy a file of weights.
    if options.save_path.exists() and options.save_path.open("rb").read(len(MAGIC)) != MAGIC:
        raise ConversionError(
            f"{options.save_path}: --overwrite replaces a GGUF file only, got another file. Choose another name."
        )


@contextmanager
def _open_hugging_face(options: GgufOptions, on_step: OnStep) -> Iterator[Path]:
    """The folder itself; of a Megatron checkpoint an export beside the target, which goes away with the block."""
    # A path that is no folder goes this way too: reading config.json below names what is missing.
    if (options.load_dir / CONFIG_NAME).is_file() or not options.load_dir.is_dir():
        if options.iteration is not None or options.tokenizer_path is not None:
            raise ConversionError(
                f"{options.load_dir}: --iteration and --tokenizer-model are for a Megatron checkpoint, "
                "got a Hugging Face folder. Leave them out."
            )
        yield options.load_dir
        return
    from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face

    # Beside the target, not in the system's temporary folder, which is often too small for a model.
    options.save_path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        prefix=f"{options.save_path.name}.", suffix=".partial", dir=options.save_path.parent
    ) as folder:
        export_options = ExportOptions(
            load_dir=options.load_dir,
            save_dir=Path(folder) / "hf",
            iteration=options.iteration,
            tokenizer_path=options.tokenizer_path,
            # "tensors" still compares every tensor of the export; only the computation of both models is left out.
            verify="auto" if options.is_verified else "tensors",
            find_chat=options.find_chat,
        )
        export_to_hugging_face(export_options, lambda stage, done, total: on_step(f"{stage} the export", done, total))
        yield export_options.save_dir


def _prove(
    options: GgufOptions,
    path: Path,
    hf_dir: Path,
    model: HfModel,
    vocabulary: GgufVocabulary,
    num_parameters: int,
    on_step: OnStep,
) -> GgufProof:
    # None, not True: a check that was not done must not count as passed.
    if absence := explain_absence(is_asked=options.is_verified):
        return GgufProof(rows=(CheckRow("llama.cpp", absence, None),))
    return verify_with_llama_cpp(
        path,
        hf_dir,
        vocabulary,
        file_type=options.file_type,
        num_parameters=num_parameters,
        max_positions=model.shape.max_position_embeddings,
        corpus=options.corpus,
        text_key=options.text_key,
        on_text=lambda done: on_step("comparing texts", done, None),
    )


def _describe_exactness(tensors: list[GgufTensor]) -> str:
    num_exact = sum(tensor.type in FLOAT_DTYPES for tensor in tensors)
    if num_exact == len(tensors):
        return "all equal to their source"
    return f"{num_exact} equal to their source, {len(tensors) - num_exact} near it"


def _list_left_out(source: HfFolder) -> list[str]:
    """Copies of the tied embedding, and buffers; llama.cpp needs neither."""
    copies = (f"tied to {name}" for name in source.sources.duplicates.values())
    reasons = Counter([*copies, *source.sources.buffers.values()])
    return [f"{count} stored tensor(s) left out: {reason}" for reason, count in reasons.items()]


def _list_fallbacks(tensors: list[GgufTensor], file_type: str) -> list[str]:
    """Tensors that are not in a type of the mixture because their rows are not whole blocks."""
    block_size = GGML_QUANT_SIZES[FILE_TYPES[file_type].default][0]
    fallen = Counter(
        (tensor.shape[-1], tensor.type.name.lower())
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.shape[-1] % block_size
    )
    return [
        f"{count} tensor(s) are {name}: their rows of {size} values are not whole blocks of {block_size}"
        for (size, name), count in fallen.items()
    ]
