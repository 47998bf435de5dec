"""What config.json and generation_config.json say beside the architecture: kept with a checkpoint, and written again.

Megatron has no place for the several ends of a text, the padding token or the settings of sampling. An import copies
both files into the checkpoint (`hugging_face/` in the iteration's folder, beside `tokenizer/`). An export takes from
them what it does not derive from the model itself, and names what it cannot take.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_json import (
    CONFIG_NAME,
    GENERATION_NAME,
    list_other_fields,
    read_config,
)
from megatron_hammer.files.read import is_present

SIDECAR_DIR = "hugging_face"  # in the iteration's folder, so that they come and go together


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceDescriptions:
    """The two files of the folder that a model began as. generation: None if it had none."""

    directory: Path
    config: dict[str, Any]
    generation: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CarriedFields:
    """What an export writes beside the architecture, and a note on everything that it leaves out.

    config: fields for config.json. generation: the content of generation_config.json; None for no such file.
    """

    config: dict[str, Any]
    generation: dict[str, Any] | None
    notes: tuple[str, ...]


def require_descriptions(hf_dir: Path) -> None:
    """Raise ConversionError for a generation_config.json that no export could read; config.json was read already."""
    if is_present(path := hf_dir / GENERATION_NAME):
        read_config(path)


def copy_descriptions(hf_dir: Path, checkpoint_dir: Path) -> None:
    """Keep both files of a Hugging Face folder in the folder of an iteration."""
    target = checkpoint_dir / SIDECAR_DIR
    target.mkdir()
    for name in (CONFIG_NAME, GENERATION_NAME):
        if is_present(hf_dir / name):
            shutil.copyfile(hf_dir / name, target / name)


def find_descriptions(args: Any, checkpoint_dir: Path) -> SourceDescriptions | None:
    """The files of the folder that the model of a checkpoint began as; None where it began without one, or they moved.

    Raises ConversionError if one of them is not JSON.
    """
    candidates = [checkpoint_dir / SIDECAR_DIR]
    if getattr(args, "load_hf", None):
        candidates.append(Path(args.load_hf))
    # A run that began from an import saves elsewhere, and still names the tokenizer beside the import's files.
    if getattr(args, "tokenizer_model", None):
        candidates.append(Path(args.tokenizer_model).parent / SIDECAR_DIR)
    for directory in candidates:
        if is_present(directory / CONFIG_NAME):
            generation_path = directory / GENERATION_NAME
            generation = read_config(generation_path) if is_present(generation_path) else None
            return SourceDescriptions(
                directory=directory, config=read_config(directory / CONFIG_NAME), generation=generation
            )
    return None


def select_carried(source: SourceDescriptions, *, vocab_size: int) -> CarriedFields:
    """What of the files the exported model can have; vocab_size: of it."""
    config, left_out = list_other_fields(source.config)
    notes = [f"{CONFIG_NAME}, {name}: left out: {reason}" for name, reason in left_out.items()]
    config, strange = _drop_foreign_ids(config, vocab_size)
    notes += [f"{CONFIG_NAME}, {note}" for note in strange]
    generation = None
    if source.generation is not None:
        generation, strange = _drop_foreign_ids(source.generation, vocab_size)
        notes += [f"{GENERATION_NAME}, {note}" for note in strange]
    return CarriedFields(config=config, generation=generation, notes=tuple(notes))


def _drop_foreign_ids(fields: Mapping[str, Any], vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The fields without token ids that the model does not have, and a sentence for each such id."""
    kept, notes = {}, []
    for name, value in fields.items():
        ids = value if isinstance(value, list) else [value]
        foreign = [number for number in ids if isinstance(number, int) and number >= vocab_size]
        if name.endswith("_token_id") and foreign:
            notes.append(f"{name}: left out: the model has {vocab_size:,} tokens, got {foreign}")
            value = [number for number in ids if number not in foreign]
            if not value:
                continue
        kept[name] = value
    return kept, notes
