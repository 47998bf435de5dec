"""What a checkpoint holds: its tensors, its layout, its iteration, and the recipe of its training.

Reads only metadata and the common state, and tensors for the statistics that are asked for. A field that the checkpoint
does not have is None. `tables.py` prints the result.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, read_config, read_hf_model
from megatron_hammer.checkpoint.hugging_face.tensor_sources import HF_BUFFER_ENDINGS
from megatron_hammer.checkpoint.inspection.tensor_statistics import TensorStatistics, measure_tensor
from megatron_hammer.checkpoint.inspection.tensor_views import (
    OpenedCheckpoint,
    TensorView,
    describe_architecture,
    view_by_table_names,
    view_store,
)
from megatron_hammer.checkpoint_files.checkpoint_reader import (
    BUFFER_ENDINGS,
    OPTIMIZER_PREFIXES,
    VOCABULARY_TENSORS,
    name_dtype,
)
from megatron_hammer.errors import CheckpointError, HammerError

# What is shown: (its name, the saved arguments that hold it, joined by a space).
LAYOUT_ARGUMENTS = (
    ("world size", ("world_size",)),
    ("tensor parallel", ("tensor_model_parallel_size",)),
    ("pipeline parallel", ("pipeline_model_parallel_size",)),
    ("virtual stages a rank", ("virtual_pipeline_model_parallel_size",)),
    ("context parallel", ("context_parallel_size",)),
    ("data parallel", ("data_parallel_size",)),
    ("expert parallel", ("expert_model_parallel_size",)),
    ("expert tensor parallel", ("expert_tensor_parallel_size",)),
    ("sequence parallel", ("sequence_parallel",)),
    ("modules", ("transformer_impl",)),
)
RECIPE_ARGUMENTS = (
    ("preset", ("preset",)),
    ("sequence length", ("seq_length",)),
    ("global batch", ("global_batch_size",)),
    ("micro batch", ("micro_batch_size",)),
    ("steps planned", ("train_iters",)),
    ("samples planned", ("train_samples",)),
    ("lr", ("lr",)),
    ("least lr", ("min_lr",)),
    ("lr schedule", ("lr_decay_style",)),
    ("warm-up steps", ("lr_warmup_iters",)),
    ("warm-up samples", ("lr_warmup_samples",)),
    ("warm-up fraction", ("lr_warmup_fraction",)),
    ("optimizer", ("optimizer",)),
    ("weight decay", ("weight_decay",)),
    ("Adam betas, epsilon", ("adam_beta1", "adam_beta2", "adam_eps")),
    ("gradient clipping", ("clip_grad",)),
    ("dropout hidden, attention", ("hidden_dropout", "attention_dropout")),
    ("parameters in", ("params_dtype",)),
    ("seed", ("seed",)),
    ("tokenizer", ("tokenizer_type", "tokenizer_model")),
    ("data", ("data_path", "data_args_path")),
    ("split", ("split",)),
    ("data order", ("data_order",)),
    ("started from Hugging Face", ("load_hf",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """A tensor under its stored name; num_chunks: the pieces that ranks wrote, None where the format has none.

    part: "model" or "optimizer".
    """

    name: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    num_elements: int
    num_bytes: int
    num_chunks: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointDescription:
    """num_parameters: of the model, every weight once; num_padding_parameters: rows beyond the vocabulary, that are
    stored besides. iterations: all that the directory has. layout, recipe, architecture, optimizer: by display name.
    objects: non-tensor entries (random states, scaling factors of fp8).
    """

    directory: Path
    format: str
    iteration: int | None
    iterations: tuple[int, ...]
    consumed_samples: int | None
    consumed_tokens: int | None
    num_parameters: int
    num_padding_parameters: int | None
    num_bytes: int
    tensors: tuple[TensorEntry, ...]
    objects: tuple[str, ...]
    layout: dict[str, Any]
    optimizer: dict[str, Any]
    recipe: dict[str, Any]
    architecture: dict[str, Any]
    notes: tuple[str, ...]


def describe_checkpoint(opened: OpenedCheckpoint) -> CheckpointDescription:
    """Everything that is known without reading a tensor."""
    args = opened.reader.args if opened.is_megatron else None
    architecture, notes = _describe_architecture(opened)
    # Tokens are samples times seq_length: every sample of megatron's GPT dataset has that many.
    samples, seq_length = getattr(args, "consumed_train_samples", None), getattr(args, "seq_length", None)
    num_parameters, num_padding = count_parameters(opened)
    tensors = tuple(list_tensors(opened))
    return CheckpointDescription(
        directory=opened.directory,
        format=opened.format,
        iteration=opened.reader.iteration if opened.is_megatron else None,
        iterations=tuple(list_iterations(opened.directory.parent)) if opened.is_megatron else (),
        consumed_samples=samples,
        consumed_tokens=samples * seq_length if samples is not None and seq_length else None,
        num_parameters=num_parameters,
        num_padding_parameters=num_padding,
        num_bytes=sum(entry.num_bytes for entry in tensors),
        tensors=tensors,
        objects=tuple(sorted(opened.store.objects)) if opened.store is not None else (),
        layout=_read_arguments(args, LAYOUT_ARGUMENTS),
        optimizer=describe_optimizer(opened, tensors),
        recipe=_read_arguments(args, RECIPE_ARGUMENTS),
        architecture=architecture,
        notes=notes,
    )


def list_iterations(save_dir: Path) -> list[int]:
    """The iterations in a directory that training saved into."""
    names = (re.fullmatch(r"iter_(\d+)", entry.name) for entry in save_dir.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in names if match)


def list_tensors(opened: OpenedCheckpoint) -> Iterator[TensorEntry]:
    """Every stored tensor, the optimizer's too, in the order of the files: torch_dist by key, layers stacked."""
    store = opened.store
    views = opened.views if store is None else view_store(store)
    for name, view in views.items():
        yield TensorEntry(
            name=name,
            part="optimizer" if name.startswith(OPTIMIZER_PREFIXES) else "model",
            shape=view.shape,
            dtype=name_dtype(view.dtype),
            num_elements=view.num_elements,
            num_bytes=view.num_bytes,
            num_chunks=None if store is None else len(store.tensors[name].chunks),
        )


def count_parameters(opened: OpenedCheckpoint) -> tuple[int, int | None]:
    """(parameters, those of vocabulary padding besides), exactly; None where the vocabulary's size is not known."""
    if not opened.is_megatron:
        # Vocabulary padding is Megatron's; rows of a Hugging Face folder are all the model's.
        return _count_folder_parameters(opened), 0
    stored = sum(view.num_elements for name, view in opened.views.items() if not name.endswith(BUFFER_ENDINGS))
    vocab_size = getattr(opened.reader.args, "vocab_size", None)
    if not vocab_size:
        return stored, None
    padding = 0
    for name in VOCABULARY_TENSORS:
        if (view := opened.views.get(name)) is not None and view.shape[0] > vocab_size:
            padding += (view.shape[0] - vocab_size) * (view.num_elements // view.shape[0])
    return stored - padding, padding


def _count_folder_parameters(opened: OpenedCheckpoint) -> int:
    """Buffers and the second copy of a tied head are not counted; if the family is unknown, everything is."""
    try:
        views = view_by_table_names(opened, read_hf_model(opened.directory))
    except HammerError:
        views = opened.views
    return sum(view.num_elements for name, view in views.items() if not name.endswith(HF_BUFFER_ENDINGS))


def _describe_architecture(opened: OpenedCheckpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The model by its fields; if it cannot be converted, the content of config.json, and a note for each reason."""
    try:
        values = describe_architecture(opened)
    except HammerError as error:
        notes = tuple(f"no conversion: {problem}" for problem in error.problems)
        if opened.is_megatron:
            return {}, notes
        try:
            return read_config(opened.directory / CONFIG_NAME), notes
        except HammerError:
            return {}, notes
    except AttributeError as error:
        return {}, (f"no conversion: the saved arguments are incomplete ({error})",)
    return {name: value for name, value in values.items() if value is not None}, ()


def _read_arguments(args: Any, wanted: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, Any]:
    """Display name -> value of what was saved and set."""
    found = {}
    for name, arguments in wanted:
        values = [value for argument in arguments if (value := getattr(args, argument, None)) is not None]
        if values:
            texts = [_plain(value) for value in values]
            found[name] = texts[0] if len(texts) == 1 else " ".join(map(str, texts))
    return found


def _plain(value: Any) -> Any:
    """A value that JSON can have."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value).removeprefix("torch.")


def describe_optimizer(opened: OpenedCheckpoint, tensors: tuple[TensorEntry, ...]) -> dict[str, Any]:
    """Whether the optimizer's state is there, how it was cut, and where its schedule stands."""
    own = [entry for entry in tensors if entry.part == "optimizer"]
    if opened.store is None:
        return {}
    if not own:
        return {"state": "none: weights only"}
    common: Mapping[str, Any] = opened.store.common_state
    found: dict[str, Any] = {"state": f"{len(own)} tensors of {', '.join(sorted({_moment(e.name) for e in own}))}"}
    # DistributedOptimizer.sharded_state_dict writes the format into its own state too (param_state_sharding_type).
    content = common.get("content_metadata") or {}
    optimizer = common.get("optimizer")
    sharding = content.get("distrib_optim_sharding_type")
    if sharding is None and isinstance(optimizer, Mapping):
        sharding = optimizer.get("param_state_sharding_type")
    found["format"] = f"distributed, {sharding}" if sharding else "not distributed"
    groups = list(_find_param_groups(optimizer))
    for name in ("step", "lr", "weight_decay"):
        values = {group[name] for group in groups if isinstance(group.get(name), (int, float))}
        if values:
            # The groups differ (vectors have no weight decay): the 0 of one must not hide the value of the others.
            found[name.replace("_", " ")] = max(values)
    scheduler = common.get("opt_param_scheduler")
    if isinstance(scheduler, Mapping) and "num_steps" in scheduler:
        found["scheduler at sample"] = scheduler["num_steps"]
    return found


def _moment(name: str) -> str:
    """exp_avg of `optimizer.state.exp_avg.decoder.layers...`."""
    # ChainedOptimizer.sharded_state_dict writes chained_N in front of the keys, except in the reshardable formats.
    match = re.match(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.", name)
    return match[1] if match else name.split(".")[1] if "." in name else name


def _find_param_groups(state: Any) -> Iterator[Mapping[str, Any]]:
    """Every parameter group in an optimizer's common state, chained optimizers included."""
    if isinstance(state, Mapping):
        if isinstance(state.get("param_groups"), list):
            yield from (group for group in state["param_groups"] if isinstance(group, Mapping))
        # The nesting depends on the optimizer: plain, distributed, mixed precision, or chained under 0 and 1.
        for name, value in state.items():
            if name != "param_groups":
                yield from _find_param_groups(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _find_param_groups(value)


# --- statistics ------------------------------------------------------------------------------------------------------


def select_views(opened: OpenedCheckpoint, patterns: tuple[str, ...]) -> dict[str, TensorView]:
    """The tensors that statistics look at: the weights layer by layer, the optimizer's by key; with patterns, those
    whose name matches one of them (shell wildcards).

    Without patterns the optimizer's are left out. Raises CheckpointError if nothing matches.
    """
    # The optimizer's state is several times larger than the weights, so it is read only if it is asked for.
    if not patterns:
        return opened.views
    views = dict(opened.views)
    if opened.store is not None:
        views |= {key: view for key, view in view_store(opened.store).items() if key.startswith(OPTIMIZER_PREFIXES)}
    chosen = {
        name: view for name, view in views.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise CheckpointError(
            f"{opened.directory}: a tensor must match --names, got none for {', '.join(patterns)} among {len(views)} "
            "names. Shell wildcards match whole names, as in '*linear_qkv*'."
        )
    return chosen


def measure_tensors(
    views: Mapping[str, TensorView], on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, TensorStatistics]:
    """Statistics of every view, reading one tensor at a time."""
    measured = {}
    for number, (name, view) in enumerate(views.items(), start=1):
        measured[name] = measure_tensor(view.read())
        on_tensor(number, len(views))
    return measured
