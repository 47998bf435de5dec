"""Rewrites a training checkpoint for another layout; weights and optimizer keep every bit, and --load resumes it.

What changes: the optimizer's param groups between expert parallelism and none (`optimizer_groups.py`), the padding of
the vocabulary, the boxes that tensors lie in (`chunk_layout.py`), and the parallel sizes in the saved arguments.

Random states belong to the ranks of a layout. They are kept if the tensor and pipeline sizes stay the same. Otherwise
they are left out, because megatron ignores them then, and the resumed run draws from its --seed. Only dropout uses
them.
"""

import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.surgery.chunk_layout import ShardLayout, layout_of
from megatron_hammer.checkpoint.surgery.optimizer_groups import merge_expert_optimizer, split_expert_optimizer
from megatron_hammer.checkpoint.surgery.rewriting import (
    OnTensor,
    PlannedCheckpoint,
    PlannedTensor,
    copy_objects,
    plan_copy,
    write_planned_checkpoint,
)
from megatron_hammer.checkpoint.surgery.training_checkpoint import (
    RERUN_PREFIX,
    RNG_PREFIX,
    TrainingCheckpoint,
    open_training_checkpoint,
    require_reshardable_optimizer,
)
from megatron_hammer.checkpoint.surgery.vocabulary_rows import (
    count_padded_rows,
    is_vocabulary_key,
    read_rows,
    read_vocab_size,
)
from megatron_hammer.config.model_arguments import read_model
from megatron_hammer.config.preflight.layout import find_layout_problems
from megatron_hammer.config.read_plan import count_least_world_size, read_layers_per_chunk, read_layout
from megatron_hammer.errors import ConversionError

# Arguments that depend on the number of stages; they are unset when it changes.
_STAGE_ARGUMENTS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
)

# Of arguments that are never None.
_DEFAULTS = {
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "rotary_percent": 1.0,
    "residual_multiplier": 1.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetLayout:
    """Parallel sizes in mcore's names; None keeps the checkpoint's.

    num_virtual_stages_per_pipeline_rank: kept only if the number of stages is.
    expert_tensor_parallel_size: follows the tensor-parallel size where it did before.
    """

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    expert_model_parallel_size: int | None = None
    expert_tensor_parallel_size: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReshardReport:
    """What was written. layout_before, layout: as `TP2 PP1 EP1`. notes: sentences about what was left out."""

    save_dir: Path
    iteration: int | None
    layout_before: str
    layout: str
    num_weights: int
    num_optimizer_tensors: int
    num_bytes: int
    notes: tuple[str, ...]
    elapsed_s: float


def reshard(
    load_dir: Path,
    save_dir: Path,
    target: TargetLayout,
    *,
    iteration: int | None = None,
    overwrite: bool = False,
    on_tensor: OnTensor = lambda stage, done, total: None,
) -> ReshardReport:
    """Write `save_dir` for the target layout, complete and read back, or nothing.

    Raises HammerError if the checkpoint is damaged, its optimizer is tied to its layout, or the target does not fit the
    model.
    """
    started_at_s = time.monotonic()
    checkpoint = open_training_checkpoint(load_dir, iteration=iteration)
    require_reshardable_optimizer(
        checkpoint, remedy="Resume once at its own layout and save with --dist-ckpt-optim-fully-reshardable."
    )
    _refuse_no_sizes(target)
    args = _change_arguments(checkpoint.args, target)
    if problems := _find_problems(args):
        raise ConversionError(*problems)
    planned, notes = _plan(checkpoint, args)
    write_planned_checkpoint(save_dir, planned, on_tensor, sources=[checkpoint], overwrite=overwrite)
    return ReshardReport(
        save_dir=save_dir,
        iteration=checkpoint.iteration,
        layout_before=describe_layout(checkpoint.args),
        layout=describe_layout(args),
        num_weights=len(checkpoint.model),
        num_optimizer_tensors=len(checkpoint.optimizer),
        num_bytes=sum(tensor.num_bytes for tensor in planned.tensors),
        notes=notes,
        elapsed_s=time.monotonic() - started_at_s,
    )


class _Unset(Namespace):
    """Arguments of which one that the checkpoint's version did not have is unset, or has Megatron's default."""

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for special methods, and must be told that there are none.
        if name.startswith("__"):
            raise AttributeError(name)
        return _DEFAULTS.get(name)


def _find_problems(args: Namespace) -> list[str]:
    """What training's own preflight says of the layout."""
    args = _Unset(**vars(args))
    return find_layout_problems(
        read_model(args),
        read_layout(args),
        world_size=args.world_size,
        layers_per_chunk=read_layers_per_chunk(args),
        seq_length=args.seq_length,
    )


def describe_layout(args: Any) -> str:
    """As `TP2 PP4 VPP2 EP1`."""
    virtual = getattr(args, "num_virtual_stages_per_pipeline_rank", None)
    sizes = {
        "TP": getattr(args, "tensor_model_parallel_size", 1),
        "PP": getattr(args, "pipeline_model_parallel_size", 1),
        "VPP": virtual if virtual and virtual > 1 else None,
        "EP": getattr(args, "expert_model_parallel_size", 1),
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size is not None)


def _plan(checkpoint: TrainingCheckpoint, args: Namespace) -> tuple[PlannedCheckpoint, tuple[str, ...]]:
    layout = layout_of(args)
    tensors = [_plan_tensor(checkpoint, key, layout, args) for key in (*checkpoint.model, *checkpoint.optimizer)]
    # Extra states belong to layers, not to ranks.
    objects = checkpoint.list_model_objects()
    state = checkpoint.copy_common_state()
    # megatron reads the layout from here, for example to decide whether the random states fit (checkpointing.py).
    state["args"] = args
    if "optimizer" in state:
        state["optimizer"] = _change_optimizer(checkpoint, state["optimizer"], args)
    notes = []
    if _is_same(checkpoint.args, args, "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        objects += checkpoint.list_objects(RNG_PREFIX)
    elif checkpoint.list_objects(RNG_PREFIX):
        args.no_save_rng = True  # otherwise megatron would look for them
        notes.append("random states belong to the old ranks and were left out: the resumed run draws from its --seed")
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size", "world_size")
    if _is_same(checkpoint.args, args, *sizes):
        objects += checkpoint.list_objects(RERUN_PREFIX)
    else:
        state.pop("rerun_state_machine", None)
    planned = PlannedCheckpoint(
        tensors=tensors,
        objects=copy_objects(checkpoint, objects),
        common_state=state,
        iteration=checkpoint.iteration,
    )
    return planned, tuple(notes)


def _plan_tensor(checkpoint: TrainingCheckpoint, key: str, layout: ShardLayout, args: Namespace) -> PlannedTensor:
    stored = checkpoint.store.tensors[key]
    if not is_vocabulary_key(key) or stored.shape[0] == args.padded_vocab_size:
        return plan_copy(checkpoint, key, layout.cut(key, stored.shape))
    vocab_size = read_vocab_size(checkpoint)
    shape = (args.padded_vocab_size, *stored.shape[1:])
    return PlannedTensor(
        key=key,
        shape=shape,
        dtype=stored.dtype,
        boxes=layout.cut(key, shape),
        read=lambda offsets, sizes: read_rows(checkpoint, key, offsets, sizes, num_rows=vocab_size),
    )


def _change_optimizer(checkpoint: TrainingCheckpoint, state: dict[Any, Any], args: Namespace) -> dict[Any, Any]:
    if not getattr(args, "num_experts", None):
        return state
    # Source of the condition: use_expert_pgs of megatron.core.tensor_parallel.layers.ColumnParallelLinear.
    if args.expert_model_parallel_size == 1 and args.expert_tensor_parallel_size == args.tensor_model_parallel_size:
        return merge_expert_optimizer(state)
    has_vectors = any(
        ".mlp.experts." in key and len(stored.shape) == 3  # layer, expert, and one axis of its own
        for key, stored in checkpoint.model.items()
    )
    return split_expert_optimizer(state, has_expert_vectors=has_vectors)


def _change_arguments(saved: Any, target: TargetLayout) -> Namespace:
    """The saved arguments with the target's sizes, and with what megatron derives from them."""
    # `args` is written, so it keeps only what was saved; `saved` may be asked for anything.
    args, saved = Namespace(**vars(saved)), _Unset(**vars(saved))
    tp = target.tensor_model_parallel_size or saved.tensor_model_parallel_size or 1
    pp = target.pipeline_model_parallel_size or saved.pipeline_model_parallel_size or 1
    tp_saved = saved.tensor_model_parallel_size or 1
    etp_saved = saved.expert_tensor_parallel_size or tp_saved
    etp_kept = tp if etp_saved == tp_saved else etp_saved
    args.tensor_model_parallel_size = tp
    args.pipeline_model_parallel_size = args.transformer_pipeline_model_parallel_size = pp
    args.expert_model_parallel_size = target.expert_model_parallel_size or saved.expert_model_parallel_size or 1
    args.expert_tensor_parallel_size = target.expert_tensor_parallel_size or etp_kept
    # megatron turns it off at TP 1, and requires it for experts with tensor parallelism.
    args.sequence_parallel = tp > 1 and bool(saved.sequence_parallel or saved.num_experts)
    for name, before, now in (
        ("tensor_parallel_num_weight_shards", tp_saved, tp),
        ("expert_tensor_parallel_num_weight_shards", etp_saved, args.expert_tensor_parallel_size),
    ):
        if getattr(saved, name, None):
            setattr(args, name, getattr(saved, name) // before * now)
    _change_stages(args, saved, target)
    _change_world(args, saved)
    # Padding is to a multiple of make_vocab_size_divisible_by times TP, so it may change with TP only.
    if saved.vocab_size and tp != tp_saved:
        args.padded_vocab_size = count_padded_rows(args)
    return args


def _refuse_no_sizes(target: TargetLayout) -> None:
    """Raise ConversionError for a size below 1, of which 0 would stand for the checkpoint's."""
    sizes = {name.replace("_", "-"): getattr(target, name) for name in TargetLayout.__dataclass_fields__}
    problems = [
        f"{flag}: must be at least 1, got {flag}={size}. Drop it to keep the checkpoint's."
        for flag, size in sizes.items()
        if size is not None and size < 1
    ]
    if problems:
        raise ConversionError(*problems)


def _change_stages(args: Namespace, saved: Any, target: TargetLayout) -> None:
    is_same_number = args.pipeline_model_parallel_size == saved.pipeline_model_parallel_size
    if not is_same_number:
        for name in _STAGE_ARGUMENTS:
            setattr(args, name, None)
    if not is_same_number or target.num_virtual_stages_per_pipeline_rank is not None:
        args.num_layers_per_virtual_pipeline_stage = None
        virtual = target.num_virtual_stages_per_pipeline_rank
        args.num_virtual_stages_per_pipeline_rank = virtual
        args.virtual_pipeline_model_parallel_size = virtual if virtual and virtual > 1 else None
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        if getattr(target, name) is not None:
            setattr(args, name, getattr(target, name))


def _change_world(args: Namespace, saved: Any) -> None:
    """world_size is kept if the layout fits it a whole number of times, else it is the smallest that fits."""
    args.context_parallel_size = saved.context_parallel_size or 1
    least = count_least_world_size(args)
    args.world_size = saved.world_size if saved.world_size and saved.world_size % least == 0 else least
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    args.data_parallel_size = args.world_size // ranks


def _is_same(saved: Any, args: Namespace, *names: str) -> bool:
    return all(getattr(saved, name, None) == getattr(args, name) for name in names)
