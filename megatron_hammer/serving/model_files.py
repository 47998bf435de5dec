"""The files that an engine loads: a GGUF file or a Hugging Face folder, made from what the user has.

What is made lies in a cache under a name that contains the hash of everything it was made from, so a second start finds
it, and a model that was trained on or has another tokenizer gets a new one. Nothing is ever removed from a cache that
the user chose. The conversions are those of `hammer convert`, with their proofs.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hammer import __version__
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HASHES_FILE, hash_file
from megatron_hammer.errors import ConfigError

if TYPE_CHECKING:
    from megatron_hammer.checkpoint.gguf.to_gguf import GgufReport

OnStep = Callable[[str, int, int | None], None]
# What the converters read of a folder; a trainer may have left an optimizer's state beside it.
_WEIGHT_SUFFIXES = frozenset({".bin", ".safetensors"})
_MODEL_SUFFIXES = _WEIGHT_SUFFIXES | {".jinja", ".json", ".model", ".txt"}
_NUM_THREADS = 4  # hashing is as fast as the disk with a few
_KEY_DIGITS, _LONGEST_NAME = 16, 60


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """path: a GGUF file, a Hugging Face folder, or a directory that training saved into.

    file_type: of the weights in a GGUF file, a key of FILE_TYPES; None: f16. iteration, tokenizer_path: of a
    checkpoint, as in ExportOptions. chat_template: name or file for a checkpoint; None: that of the conversations that
    it was trained on.
    """

    path: Path
    file_type: str | None = None
    iteration: int | None = None
    tokenizer_path: Path | None = None
    chat_template: str | None = None
    is_verified: bool = True

    @property
    def name(self) -> str:
        """What clients call the model unless the user says another name."""
        path = self.path.resolve()
        return path.stem if self.is_gguf else path.name

    @property
    def is_gguf(self) -> bool:
        return not self.path.is_dir()

    @property
    def is_hugging_face(self) -> bool:
        return (self.path / "config.json").is_file()


@contextmanager
def open_gguf(source: ModelSource, cache_dir: Path | None, on_step: OnStep) -> Iterator[Path]:
    """Yield a GGUF file of the model. cache_dir: None for a temporary folder, removed with the block.

    Raises HammerError if the model cannot be converted.
    """
    if source.is_gguf:
        _refuse_flags(source, "GGUF file", "--type", "--iteration", "--tokenizer-model")
        yield source.path
        return
    if source.is_hugging_face:
        _refuse_flags(source, "Hugging Face folder", "--iteration", "--tokenizer-model")
    with _open_cache(cache_dir) as folder:
        path = folder / f"{source.name[:_LONGEST_NAME]}-{_compute_key(source)}.gguf"
        if not path.is_file():
            from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
            from megatron_hammer.post_training.templates.chat_export import find_chat_format

            options = GgufOptions(
                load_dir=source.path,
                save_path=path,
                file_type=source.file_type or "f16",
                iteration=source.iteration,
                tokenizer_path=source.tokenizer_path,
                name=source.name,
                is_verified=source.is_verified,
                find_chat=partial(find_chat_format, source=source.chat_template, bindings=()),
                overwrite=True,  # another start may have made it meanwhile
            )
            _tell(export_to_gguf(options, on_step))
        yield path


def _tell(report: "GgufReport") -> None:
    """Print what is not as in transformers, and what could not be compared."""
    open_rows = (f"{row.check}: {row.result}" for row in report.checks if row.is_passed is None)
    for note in (*report.notes, *open_rows):
        print(f"note: {note}", file=sys.stderr)


@contextmanager
def open_hugging_face(source: ModelSource, cache_dir: Path | None, on_step: OnStep) -> Iterator[Path]:
    """Yield a Hugging Face folder of a model that is no GGUF file; see `open_gguf`."""
    _refuse_flags(source, "model for --engine vllm", "--type")
    if source.is_hugging_face:
        _refuse_flags(source, "Hugging Face folder", "--iteration", "--tokenizer-model")
        yield source.path
        return
    with _open_cache(cache_dir) as folder:
        path = folder / f"{source.name[:_LONGEST_NAME]}-{_compute_key(source)}"
        if not path.is_dir():
            from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
            from megatron_hammer.post_training.templates.chat_export import find_chat_format

            options = ExportOptions(
                load_dir=source.path,
                save_dir=path,
                iteration=source.iteration,
                tokenizer_path=source.tokenizer_path,
                verify="auto" if source.is_verified else "tensors",
                find_chat=partial(find_chat_format, source=source.chat_template, bindings=()),
                overwrite=True,
            )
            export_to_hugging_face(options, on_step)
        yield path


def _refuse_flags(source: ModelSource, kind: str, *flags: str) -> None:
    given = {
        "--type": source.file_type,
        "--iteration": source.iteration,
        "--tokenizer-model": source.tokenizer_path,
    }
    if useless := [flag for flag in flags if given[flag] is not None]:
        raise ConfigError(f"{source.path}: {', '.join(useless)} cannot be used with a {kind}. Leave it out.")


@contextmanager
def _open_cache(cache_dir: Path | None) -> Iterator[Path]:
    if cache_dir is not None:
        yield cache_dir
        return
    with tempfile.TemporaryDirectory(prefix="hammer-serve-") as folder:
        yield Path(folder)


def _compute_key(source: ModelSource) -> str:
    """A hash of the contents of everything that the result depends on, and of how it is made."""
    if source.is_hugging_face:
        files, template = _list_model_files(source.path), None
    else:
        files, template = _describe_checkpoint(source)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        hashes = list(pool.map(lambda path: hash_file(path).sha256, files.values()))
    made_by = [__version__, source.name, source.file_type, source.is_verified, template]
    text = json.dumps([sorted(zip(files, hashes, strict=True)), made_by])
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


def _list_model_files(folder: Path) -> dict[str, Path]:
    paths = [path for path in [*folder.glob("*"), *folder.glob("*/*.jinja")] if path.suffix in _MODEL_SUFFIXES]
    return {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}


def _describe_checkpoint(source: ModelSource) -> tuple[dict[str, Path], str | None]:
    """The files of an iteration and of its tokenizer, and the hash of its chat template.

    Of the iteration its file of hashes, which covers the others; or all of them, where it was saved without one.
    """
    from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
    from megatron_hammer.checkpoint_files.saved_arguments import find_saved_tokenizer
    from megatron_hammer.post_training.templates.chat_export import find_trained_template
    from megatron_hammer.post_training.templates.chat_template import load_chat_template

    reader = open_checkpoint(source.path, iteration=source.iteration)
    names = [reader.directory / HASHES_FILE]
    if not names[0].is_file():
        names = [path for path in reader.directory.rglob("*") if path.is_file()]
    files = {path.relative_to(reader.directory).as_posix(): path for path in names}
    tokenizer = source.tokenizer_path or find_saved_tokenizer(reader.args, reader.directory)
    if tokenizer is not None:
        # What lies beside a tokenizer.json or tokenizer.model may belong to it; weights do not.
        beside = _list_model_files(tokenizer if tokenizer.is_dir() else tokenizer.parent)
        names = [path for path in beside.values() if path.suffix not in _WEIGHT_SUFFIXES]
        files |= {f"tokenizer/{path.name}": path for path in (*names, tokenizer) if path.is_file()}
    if source.chat_template is not None:
        return files, load_chat_template(source.chat_template, is_marked=False).sha256
    template = find_trained_template(reader.args)
    return files, None if template is None else template.sha256
