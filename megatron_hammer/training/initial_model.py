"""Starts a run from a Hugging Face folder (--load-hf): reads what it holds, and fills the model that megatron built.

The folder's config.json is read before the command line is, its weights' names and shapes before any process group
forms, and the weights themselves once, by every rank for its own parameters.
"""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from megatron_hammer.checkpoint.convert.fill_model import MasterWeights, fill_chunks, require_every_element
from megatron_hammer.checkpoint.hugging_face.config_json import read_hf_model
from megatron_hammer.checkpoint.hugging_face.folder import HfFolder, open_hf_folder
from megatron_hammer.config.initial_model import InitialModel
from megatron_hammer.errors import ConversionError
from megatron_hammer.platforms.device import gather_lines, sum_over_ranks

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def read_initial_model(folder: Path) -> InitialModel:
    """What --load-hf names; problems of the weights are kept for preflight, a run that resumes does not read them.

    Raises ConversionError for a folder whose config.json is not one of a mapped architecture.
    """
    hf_model = read_hf_model(folder)
    problems: tuple[str, ...] = ()
    dtype, description = hf_model.dtype or "float32", "not read"
    try:
        source = open_hf_folder(folder)
        dtype, description = _describe(source)
    except ConversionError as error:
        problems = tuple(f"load-hf: {problem}" for problem in error.problems)
    return InitialModel(
        folder=folder,
        model=hf_model.shape,
        dtype=dtype,
        hidden_dropout=hf_model.dropout.hidden,
        attention_dropout=hf_model.dropout.attention,
        description=description,
        problems=problems,
        tokenizers=_list_tokenizers(folder),
    )


def _describe(source: HfFolder) -> tuple[str, str]:
    """(dtype, weights in a few words)"""
    dtypes = Counter(str(dtype).removeprefix("torch.") for dtype in source.weights.dtypes.values())
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "mixed"
    num_bytes = source.weights.num_bytes
    size = f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
    return dtype, f"{len(source.weights.shapes):,} tensors, {size}, {' and '.join(sorted(dtypes))}"


def _list_tokenizers(folder: Path) -> tuple[Path, ...]:
    """As --tokenizer-model takes them: the folder itself for its tokenizer.json, a SentencePiece model as the file."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return tuple(folder if name.endswith(".json") else folder / name for name in found)


def build_filler(initial: InitialModel, *, rank: int, terminal: IO[str]) -> Callable[[Sequence[Any], Any], None]:
    """A function of megatron's (model chunks, optimizer) that fills both from the folder; every rank must call it."""

    def fill(chunks: Sequence[Any], optimizer: Any) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import unwrap_model

        source = open_hf_folder(initial.folder)
        modules = unwrap_model(list(chunks))
        metadata = {
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        parts = _list_parts(optimizer)
        masters = [_list_masters(part) for part in parts]
        num_held, problems = torch.zeros(len(source.pairs), dtype=torch.int64), list[str]()
        try:
            # One rank is enough: all ranks read the same folder.
            if rank == 0 and (unequal := source.list_unequal_duplicates()):
                raise ConversionError(*unequal)
            with _progress(modules, terminal if rank == 0 else None) as on_parameter:
                num_held = fill_chunks(
                    modules,
                    source,
                    metadata=metadata,
                    find_master=ChainMap(*masters).get,  # type: ignore[arg-type]
                    on_parameter=on_parameter,
                )
        except (
            ConversionError
        ) as error:  # raised once all ranks have looked, since a rank that stops alone hangs the others
            problems = list(error.problems)
        # One collective for both: the number of elements each pair filled, and whether any rank failed.
        *num_held_by_all, num_problems = sum_over_ranks(torch.cat([num_held, torch.tensor([len(problems)])])).tolist()
        if num_problems:
            raise ConversionError(*gather_lines(problems))
        require_every_element(source, num_held_by_all)
        for part, known in zip(parts, masters, strict=True):
            if not known:  # one that keeps its copies elsewhere; preflight has seen to it that none would be rounded
                part.reload_model_params()

    return fill


def _list_parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron chains, or the only one; none for a run that only evaluates."""
    return [] if optimizer is None else list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _list_masters(part: Any) -> dict[torch.Tensor, MasterWeights]:
    """Where an optimizer keeps the fp32 copy of each 16-bit parameter, whole or this rank's shard of it."""
    is_sharded = hasattr(part, "shard_fp32_from_float16_groups")
    names = (
        ("model_float16_groups", "shard_fp32_from_float16_groups")
        if is_sharded
        else ("float16_groups", "fp32_from_float16_groups")
    )
    groups = zip(*(getattr(part, name, ()) for name in names), strict=True)
    return {
        parameter: MasterWeights(
            tensor=copy.data, start=part._get_model_param_range_map(parameter)["param"].start if is_sharded else 0
        )
        for parameters, copies in groups
        for parameter, copy in zip(parameters, copies, strict=True)
        if copy is not None
    }


@contextmanager
def _progress(modules: Sequence[Any], terminal: IO[str] | None) -> Iterator[Callable[[int], None]]:
    """A bar over the parameters of this rank's part of the model, where a person watches."""
    if terminal is None or not terminal.isatty():
        yield lambda num_elements: None
        return
    columns = (TextColumn("weights"), BarColumn(), TaskProgressColumn())
    console = Console(file=terminal)
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False, transient=True) as progress:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        task = progress.add_task("", total=sum(parameter.numel() for parameter in parameters))
        yield lambda num_elements: progress.advance(task, num_elements)
