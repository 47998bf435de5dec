"""Opens the files of a legacy checkpoint, one for each rank of the model, without running their code.

`--ckpt-format torch` keeps `mp_rank_TT`, `mp_rank_TT_PPP`, `mp_rank_TT_EEE` or `mp_rank_TT_PPP_EEE`, each with a pickle
of everything the rank had. Tensors are only located here, on the meta device. The pickles name types of megatron, numpy
and apex, which become inert; any other type stops the reading.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_hammer.checkpoint_files.legacy.names import flatten_state
from megatron_hammer.checkpoint_files.pickle_reader import KNOWN_TYPES, allow_only, build_stand_ins, describe_failure
from megatron_hammer.checkpoint_files.saved_archive import SavedArchive, open_archive
from megatron_hammer.errors import CheckpointError
from megatron_hammer.files.read import is_present

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the second where the optimizer lay apart, before megatron-core
_INERT_PREFIXES = ("megatron.", "numpy.", "transformer_engine.", "apex.", "_io.BytesIO")
_MAX_RANKS = 100_000  # of one kind of parallelism, and experts; more than any cluster has
_ZIP_SIGNATURE = b"PK"
_NUM_PICKLES_BEFORE_STATE = 3  # in a file of before PyTorch 1.6: magic number, protocol, system


class ModelRank(NamedTuple):
    """Where a rank sits among those that hold different parts of the model."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFile:
    """One rank's state: `chunks` has the entries of each virtual pipeline stage by their own names."""

    path: Path
    rank: ModelRank
    args: Any
    iteration: int | None
    checkpoint_version: float
    chunks: tuple[dict[str, Any], ...]
    optimizer: Any
    archive: SavedArchive | None  # None of a file of before PyTorch 1.6, which cannot be mapped


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSizes:
    """What the saved arguments say about the ranks; before checkpoint version 3 under other names, or not at all."""

    tp: int
    pp: int
    ep: int
    expert_tp: int
    cp: int

    @property
    def has_expert_optimizer(self) -> bool:
        """Whether megatron chains an optimizer of the experts to that of the other weights.

        Source: use_expert_pgs of megatron.core.tensor_parallel.layers.ColumnParallelLinear.
        """
        return self.ep > 1 or self.expert_tp != self.tp

    @property
    def ranks(self) -> list[ModelRank]:
        """Those that wrote a file: data-parallel rank 0 of the dense layers, and of the experts.

        The expert grid reuses the ranks of a pipeline stage, so not every (tp, ep) exists where expert_tp < tp.
        Source: megatron.training.checkpointing.save_checkpoint, megatron.core.parallel_state.RankGenerator.
        """
        # The first ranks of a stage: the two products count those of data-parallel rank 0 and of expert data-parallel
        # rank 0. save_checkpoint lets both write.
        num_writers = max(self.tp * self.cp, self.expert_tp * self.ep)
        cells = {(rank % self.tp, rank // self.expert_tp % self.ep) for rank in range(num_writers)}
        return [ModelRank(tp, pp, ep) for pp in range(self.pp) for tp, ep in sorted(cells)]

    def folder_name(self, rank: ModelRank) -> str:
        """Source: megatron.training.checkpointing.get_checkpoint_name."""
        pipeline = f"_{rank.pp:03d}" if self.pp > 1 else ""
        expert = f"_{rank.ep:03d}" if self.ep > 1 else ""
        return f"mp_rank_{rank.tp:02d}{pipeline}{expert}"


def load_rank_files(directory: Path) -> tuple[ParallelSizes, list[RankFile]]:
    """Every rank's file in one iteration's directory.

    Raises CheckpointError with a sentence for every rank that is missing, every file that is damaged or holds a type
    that no checkpoint needs, and every rank whose iteration or version is not that of the first.
    """
    folders = sorted(path for path in directory.glob("mp_rank_*") if _find_model_file(path) is not None)
    if not folders:
        raise CheckpointError(
            f"{directory}: must hold mp_rank_* folders with {MODEL_FILES[0]}, got none. Copy the checkpoint again."
        )
    sizes = read_parallel_sizes(_load_first(folders).get("args"), directory)
    files, problems = [], []
    for rank in sizes.ranks:
        folder = directory / sizes.folder_name(rank)
        path = _find_model_file(folder)
        if path is None:
            problems.append(
                f"{folder}: rank must hold {MODEL_FILES[0]}, got no such file. "
                "The save was interrupted or the copy is incomplete; use another iteration or copy it again."
            )
            continue
        try:
            files.append(_open_rank_file(path, rank))
        except CheckpointError as error:
            problems += error.problems
    expected = {sizes.folder_name(rank) for rank in sizes.ranks}
    problems += [
        f"{folder}: rank must be one of tp={sizes.tp}, pp={sizes.pp}, ep={sizes.ep}, as the arguments say, "
        "got another. Files of two checkpoints are mixed; remove what does not belong."
        for folder in folders
        if folder.name not in expected
    ]
    problems += _find_mixed_states(files)
    if problems:
        raise CheckpointError(*problems)
    return sizes, files


def read_parallel_sizes(args: Any, directory: Path) -> ParallelSizes:
    """Raises CheckpointError where the arguments are missing, or spread experts in a way that overwrites files."""
    if args is None or not hasattr(args, "num_layers"):
        raise CheckpointError(
            f"{directory}: must hold Megatron's arguments, got none. Checkpoints of before they were saved do not say "
            "the number of heads; load it with the Megatron that wrote it and save it again."
        )
    _require_sizes(args, directory)
    tp = getattr(args, "tensor_model_parallel_size", None) or getattr(args, "model_parallel_size", None) or 1
    sizes = ParallelSizes(
        tp=tp,
        pp=getattr(args, "pipeline_model_parallel_size", None) or 1,
        ep=getattr(args, "expert_model_parallel_size", None) or 1,
        expert_tp=getattr(args, "expert_tensor_parallel_size", None) or tp,
        cp=getattr(args, "context_parallel_size", None) or 1,
    )
    if getattr(args, "num_experts", None) and sizes.tp % sizes.expert_tp:
        raise CheckpointError(
            f"{directory}: expert_tensor_parallel_size must divide tensor_model_parallel_size, got "
            f"etp={sizes.expert_tp}, tp={sizes.tp}: ranks of different expert shards wrote to one file. "
            "Save it with --ckpt-format torch_dist."
        )
    return sizes


def _require_sizes(args: Any, directory: Path) -> None:
    """Raise CheckpointError unless the numbers of ranks and experts are such numbers; they are counted up to below."""
    names = (
        *("tensor_model_parallel_size", "model_parallel_size", "pipeline_model_parallel_size", "num_experts"),
        *("expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size"),
    )
    values = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_RANKS:
            raise CheckpointError(
                f"{directory}: {name} must be a whole number up to {_MAX_RANKS:,}, got {str(value)[:40]}. "
                "The file is damaged or not of Megatron; use another iteration or copy it again."
            )


def load_state(path: Path, kind: type | tuple[type, ...] = dict) -> Any:
    """What torch.save wrote to `path`, of that kind: tensors on the meta device, or in memory where no map is possible.

    Raises CheckpointError, naming the file, if it is damaged or names a type that no checkpoint needs.
    """
    try:
        is_mappable = open_archive(path) is not None
        stand_ins = build_stand_ins(sorted(_list_types(path, is_mappable)), _INERT_PREFIXES)
        # The meta device: torch.load then reads the description of every tensor and no elements.
        with allow_only([*KNOWN_TYPES, *stand_ins]):
            state = torch.serialization.load(path, map_location="meta" if is_mappable else "cpu", weights_only=True)
        if not isinstance(state, kind):
            raise TypeError(f"a {type(state).__name__}")
    except Exception as error:  # damaged files can raise nearly anything
        raise CheckpointError(
            f"{path}: contents must be what --ckpt-format torch writes, got {describe_failure(error)}. "
            "The file is damaged or not a checkpoint; use another iteration or copy it again."
        ) from error
    return state


def _list_types(path: Path, is_mappable: bool) -> set[str]:
    """Every type and function that the pickle names, as module.name."""
    if is_mappable:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _scan(io.BytesIO(archive.read(name)))
    with path.open("rb") as file:
        # is_zipfile looks for the end of an archive, so a truncated archive comes here.
        if file.read(len(_ZIP_SIGNATURE)) == _ZIP_SIGNATURE:
            raise EOFError("the archive has no end")
        file.seek(0)
        for _ in range(_NUM_PICKLES_BEFORE_STATE):
            _scan(file)
        return _scan(file)


def _scan(file: Any) -> set[str]:
    return {
        str(argument).replace(" ", ".")
        for opcode, argument, _ in pickletools.genops(file)
        # STACK_GLOBAL is absent: torch.save writes protocol 2, and torch.load(weights_only=True) refuses that opcode.
        if opcode.name in ("GLOBAL", "INST")
    }


def _load_first(folders: list[Path]) -> dict[Any, Any]:
    """The first file that can be read; where none can, the problems of all."""
    problems: list[str] = []
    for folder in folders:
        path = _find_model_file(folder)
        try:
            return load_state(path) if path else {}
        except CheckpointError as error:
            problems += error.problems
    raise CheckpointError(*problems)


def _find_model_file(folder: Path) -> Path | None:
    return next((folder / name for name in MODEL_FILES if is_present(folder / name, raises=CheckpointError)), None)


def _open_rank_file(path: Path, rank: ModelRank) -> RankFile:
    state = load_state(path)
    # model0, model1, ... with interleaving. Source: megatron.training.checkpointing.generate_state_dict.
    keys = (
        ["model"]
        if "model" in state
        else sorted((key for key in state if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:]))
    )
    if not keys or not all(isinstance(state[key], Mapping) for key in keys):
        raise CheckpointError(
            f"{path}: must hold model, or model0, model1, ..., got {sorted(map(str, state))[:20]}. "
            "Pass a checkpoint that Megatron's training loop saved."
        )
    return RankFile(
        path=path,
        rank=rank,
        args=state.get("args"),
        iteration=state.get("iteration"),
        checkpoint_version=state.get("checkpoint_version", 0),
        chunks=tuple(dict(flatten_state(state[key])) for key in keys),
        optimizer=state.get("optimizer"),
        archive=open_archive(path),
    )


def _find_mixed_states(files: list[RankFile]) -> list[str]:
    problems = []
    for file in files[1:]:
        for what in ("iteration", "checkpoint_version"):  # the arguments name the rank and cannot be compared whole
            first, own = getattr(files[0], what), getattr(file, what)
            if own != first:
                problems.append(
                    f"{file.path}: {what} must be that of {files[0].path.parent.name}, got {own} and {first}. "
                    "Files of two checkpoints are mixed; copy it again."
                )
    return problems
