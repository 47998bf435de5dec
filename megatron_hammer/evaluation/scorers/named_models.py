"""The models of a command line, each with its name for tables, and the checkpoints of one run as a series of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint_files.iterations import list_iterations
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.errors import CheckpointError, ConfigError, HammerError
from megatron_hammer.evaluation.scorers.open_scorer import find_kind


@dataclass(frozen=True, slots=True)
class NamedModel:
    """name: for tables; None: its own. iteration: None for the newest of a checkpoint.

    run: the folder of the training run whose series this checkpoint is part of; None for a model by itself.
    """

    path: Path
    name: str | None = None
    iteration: int | None = None
    run: str | None = None


def split_name(text: str) -> tuple[str | None, str]:
    """NAME and PATH of NAME=PATH; a path that exists as it is written has no name, even with = in it."""
    name, separator, path = text.partition("=")
    return (None, text) if not separator or Path(text).exists() else (name, path)


def list_models(texts: Sequence[str], run_dir: Path | None = None, iterations: str | None = None) -> list[NamedModel]:
    """The models, then those of a run. Raises HammerError for everything that is not there, before one is computed.

    texts: [NAME=]PATH of each model. run_dir: --load, of which iterations, `all` or 1000,2000, are asked for; None: the
    newest.
    """
    named = list(map(split_name, texts))
    if run_dir is not None:
        named.append((None, str(run_dir)))
    # A folder that is called as another model is called by its whole path.
    names = [name or Path(path).absolute().name for name, path in named]
    models = [
        NamedModel(Path(path), name or (path if names.count(own) > 1 else None))
        for own, (name, path) in zip(names, named, strict=True)
    ]
    names = [model.name for model in models if model.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"models: names must differ, got {name} twice. Pass NAME=PATH.")
    if iterations is not None:
        newest = models.pop()
        models += [
            NamedModel(newest.path, newest.name and f"{newest.name}@{iteration}", iteration, str(newest.path))
            for iteration in select_iterations(newest.path, iterations)
        ]
    problems: list[str] = []
    for model in models:
        try:
            if find_kind(model.path) == "megatron":
                open_checkpoint(model.path, iteration=model.iteration)
        except HammerError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    return models


def select_iterations(run_dir: Path, text: str) -> list[int]:
    """`all` or 1000,2000 as iterations that are there, each once; raises ConfigError.

    all: but for empty folders, which Megatron makes before it saves.
    """
    present = [iteration for iteration, folder in list_iterations(run_dir).items() if any(folder.iterdir())]
    asked = list(map(str, present)) if text == "all" else [one.strip() for one in text.split(",")]
    if not present or not set(asked) <= set(map(str, present)):
        raise ConfigError(
            f"iterations: must be all or among those of {run_dir}, got {text}; there are "
            f"{', '.join(map(str, present)) or 'none'}. Choose of them."
        )
    return list(dict.fromkeys(map(int, asked)))
