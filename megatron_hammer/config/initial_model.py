"""What --load-hf starts from, as plain data: training/initial_model.py reads the folder, this room does not.

The folder's config.json says what the model is; a preset beside it gives only its recipe. preflight/initial_model.py
compares the two and every flag.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.data.indexed.manifest import read_manifest
from megatron_hammer.data.sources import DataPlan
from megatron_hammer.errors import DataError
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.tokenizer.encoding.encoder import hash_tokenizer


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


def initial_model_arguments(initial: InitialModel, *, has_preset: bool) -> dict[str, Any]:
    """What the folder sets: the model, and where no preset has a recipe, the model's own dropout and precision."""
    arguments = build_model_arguments(initial.model)
    # With a preset, dropout and precision are part of its recipe and are not taken from config.json.
    if not has_preset:
        arguments |= {
            "hidden_dropout": initial.hidden_dropout,
            "attention_dropout": initial.attention_dropout,
            "precision": initial.precision,
        }
    return arguments


def select_initial_tokenizer(initial: InitialModel, sources: DataPlan) -> str | None:
    """The folder's tokenizer: of several files the one that made the data, else the first; None without one.

    A run that reads data of another tokenizer than the model's is then refused by preflight.
    """
    # With a single file there is no choice, and the manifests need not be read.
    if len(initial.tokenizers) > 1:
        made_with = _read_hashes(sources)
        for path in initial.tokenizers if made_with else ():
            try:
                if hash_tokenizer(path) in made_with:
                    return str(path)
            except (DataError, OSError):
                continue  # preflight says why, if it is the one that is taken
    return str(initial.tokenizers[0]) if initial.tokenizers else None


def _read_hashes(sources: DataPlan) -> set[str]:
    """The tokenizers that the run's data sets were made with, as far as their manifests say."""
    hashes = set()
    for source in (*sources.shared, *itertools.chain.from_iterable((sources.own or {}).values())):
        try:
            manifest = read_manifest(source.prefix)
        except DataError:
            continue  # preflight reports it
        if manifest is not None:
            hashes.add(manifest.tokenizer.sha256)
    return hashes
