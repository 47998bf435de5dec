"""What --load-hf starts from, as plain data: training/hugging_face_start.py reads the folder, this package never does.

The folder's config.json says what the model is; a preset beside it gives only its recipe. `initial_model.py` compares
the two and every flag.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.config.data_flags import read_data_plan
from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.data.indexed.manifest import read_manifest
from megatron_hammer.errors import DataError
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.tokenizer.encoding.encoder import load_encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialModel:
    """A Hugging Face folder to start from.

    dtype: of its weights, "mixed" where they have several. description: its weights in a few words. problems: what is
    wrong with the names and shapes of its weights. tokenizers: what a run could take as --tokenizer-model.
    """

    folder: Path
    model: ModelShape
    dtype: str
    hidden_dropout: float
    attention_dropout: float
    description: str
    problems: tuple[str, ...] = ()
    tokenizers: tuple[Path, ...] = ()

    @property
    def precision(self) -> str:
        """The smallest precision to train in that holds every weight as it is; fp16 would need a scaled loss too."""
        return "bf16" if self.dtype == "bfloat16" else "fp32"


def initial_model_arguments(start: InitialModel, *, has_preset: bool) -> dict[str, Any]:
    """What the folder sets: the model, and where no preset has a recipe, the model's own dropout and precision."""
    arguments = build_model_arguments(start.model)
    if not has_preset:
        arguments |= {
            "hidden_dropout": start.hidden_dropout,
            "attention_dropout": start.attention_dropout,
            "precision": start.precision,
        }
    return arguments


def select_initial_tokenizer(namespace: argparse.Namespace, start: InitialModel) -> str | None:
    """The folder's tokenizer: of several files the one that made the data, else the first; None without one.

    A run that reads data of another tokenizer than the model's is then refused by preflight.
    """
    if len(start.tokenizers) > 1:
        made_with = _read_hashes(namespace)
        for path in start.tokenizers if made_with else ():
            try:
                if load_encoder(path).sha256 in made_with:
                    return str(path)
            except (DataError, OSError):
                continue  # preflight says why, if it is the one that is taken
    return str(start.tokenizers[0]) if start.tokenizers else None


def _read_hashes(namespace: argparse.Namespace) -> set[str]:
    """The tokenizers that the run's data sets were made with, as far as their manifests say."""
    plan, _ = read_data_plan(namespace)
    hashes = set()
    for source in (*plan.shared, *(source for sources in (plan.own or {}).values() for source in sources)):
        try:
            manifest = read_manifest(source.prefix)
        except DataError:
            continue  # preflight reports it
        if manifest is not None:
            hashes.add(manifest.tokenizer.sha256)
    return hashes


def find_checkpoint_to_load(namespace: argparse.Namespace) -> str | None:
    """The folder whose checkpoint a run begins with, resumed or not; None where it begins without one."""
    if namespace.load is not None and (namespace.ckpt_step or (Path(namespace.load) / LATEST_FILE).is_file()):
        return str(namespace.load)
    path: str | None = namespace.pretrained_checkpoint
    return path


def describe_weights(namespace: argparse.Namespace, start: InitialModel | None) -> str:
    """Where the first weights of a run come from, in one line."""
    load_dir = find_checkpoint_to_load(namespace)
    if load_dir is not None:
        unread = "" if start is None else f"; {start.folder} is not read again"
        return f"checkpoint in {load_dir}{unread}"
    return "random" if start is None else f"{start.folder} ({start.description})"
