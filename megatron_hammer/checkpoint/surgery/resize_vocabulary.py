"""A checkpoint for another vocabulary: rows of the embedding and the head, in the weights and in the optimizer.

New rows are made as new_rows.py says; without tokenizers, each is the mean of all old rows. Where the optimizer keeps
fp32 weights, the mean is taken of those, and the model's row is that mean rounded. New rows have no gradient history:
their moments are zero. Padding after the tokens is zero everywhere. resize_embeddings.py does the same to Hugging Face
folders.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.checkpoint.surgery.chunk_layout import layout_of
from megatron_hammer.checkpoint.surgery.new_rows import build_new_rows, load_extension
from megatron_hammer.checkpoint.surgery.rewriting import (
    OnTensor,
    PlannedCheckpoint,
    PlannedTensor,
    copy_objects,
    plan_copy,
    write_planned_checkpoint,
)
from megatron_hammer.checkpoint.surgery.training_checkpoint import (
    TrainingCheckpoint,
    open_training_checkpoint,
    parameter_key,
    require_reshardable_optimizer,
    split_optimizer_key,
)
from megatron_hammer.checkpoint.surgery.vocabulary_rows import (
    count_padded_rows,
    is_vocabulary_key,
    read_rows,
    read_vocab_size,
)
from megatron_hammer.checkpoint_files.checkpoint_reader import VOCABULARY_TENSORS
from megatron_hammer.checkpoint_files.saved_arguments import TOKENIZER_HASH, find_saved_tokenizer
from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.encoder import hash_tokenizer
from megatron_hammer.tokenizer.vocabulary.extension import spell_new_pieces

_MASTER_KINDS = ("param", "fp32_param")  # of the distributed optimizer, and of mixed precision without it


LARGEST_VOCABULARY = 100_000_000  # each new row is an entry of a list


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVocabulary:
    """What to make. vocab_size: tokens; None for as many as the new tokenizer has, or the model if that is more.

    Tokenizers: both or none; the new one must have the old one's pieces under their ids.
    """

    vocab_size: int | None = None
    old_tokenizer_path: Path | None = None
    new_tokenizer_path: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyReport:
    """What was written. num_spelled: new rows from the pieces that spell them; the others are the mean of all."""

    save_dir: Path
    iteration: int | None
    num_tokens_before: int
    num_tokens: int
    num_padded_rows_before: int
    num_padded_rows: int
    num_new_rows: int
    num_spelled: int
    resized: tuple[str, ...]
    num_copied_tensors: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """The rows of the new vocabulary: the first `num_kept` as they are, then one for each spelling.

    spellings: old ids, of which the new row is the mean; empty for the mean of the `num_old` first rows.
    """

    num_old: int
    num_kept: int
    spellings: Sequence[list[int]]

    @property
    def num_tokens(self) -> int:
        return self.num_kept + len(self.spellings)


def resize_vocabulary(
    load_dir: Path,
    save_dir: Path,
    vocabulary: NewVocabulary,
    *,
    iteration: int | None = None,
    overwrite: bool = False,
    on_tensor: OnTensor = lambda stage, done, total: None,
) -> VocabularyReport:
    """Write `save_dir`, complete and read back, or nothing.

    Raises ConversionError or CheckpointError for what cannot be resized, DataError if the tokenizers do not fit.
    """
    started_at_s = time.monotonic()
    checkpoint = open_training_checkpoint(load_dir, iteration=iteration)
    require_reshardable_optimizer(checkpoint, remedy="Drop the optimizer first, with the subcommand weights-only.")
    num_tokens_before = read_vocab_size(checkpoint)
    rows = _plan_rows(checkpoint, vocabulary, num_tokens_before)
    state = checkpoint.copy_common_state()
    args = state["args"]
    rows_before = checkpoint.model[VOCABULARY_TENSORS[0]].shape[0]
    # In this order: the padding is computed from the new vocab_size.
    args.vocab_size = rows.num_tokens
    args.padded_vocab_size = count_padded_rows(args)
    if vocabulary.new_tokenizer_path is not None:
        args.tokenizer_model = str(vocabulary.new_tokenizer_path.resolve())
        setattr(args, TOKENIZER_HASH, hash_tokenizer(vocabulary.new_tokenizer_path))
    keys = (*checkpoint.model, *checkpoint.optimizer)
    planned = PlannedCheckpoint(
        tensors=[
            _plan_tensor(checkpoint, key, rows, args) if is_vocabulary_key(key) else plan_copy(checkpoint, key)
            for key in keys
        ],
        # The layout stays, so random states stay valid too and the run resumes.
        objects=copy_objects(checkpoint, checkpoint.store.objects),
        common_state=state,
        iteration=checkpoint.iteration,
    )
    write_planned_checkpoint(save_dir, planned, on_tensor, sources=[checkpoint], overwrite=overwrite)
    return VocabularyReport(
        save_dir=save_dir,
        iteration=checkpoint.iteration,
        num_tokens_before=num_tokens_before,
        num_tokens=rows.num_tokens,
        num_padded_rows_before=rows_before,
        num_padded_rows=args.padded_vocab_size,
        num_new_rows=len(rows.spellings),
        num_spelled=sum(bool(ids) for ids in rows.spellings),
        resized=tuple(key for key in VOCABULARY_TENSORS if key in checkpoint.model),
        num_copied_tensors=sum(not is_vocabulary_key(key) for key in keys),
        elapsed_s=time.monotonic() - started_at_s,
    )


def _plan_rows(checkpoint: TrainingCheckpoint, vocabulary: NewVocabulary, num_tokens: int) -> _Rows:
    wanted = vocabulary.vocab_size
    if wanted is not None and not 1 <= wanted <= LARGEST_VOCABULARY:
        raise ConversionError(
            f"vocab-size: must be from 1 to {LARGEST_VOCABULARY:,}, got vocab_size={wanted}. Pass another."
        )
    if vocabulary.new_tokenizer_path is None:
        if wanted is None:
            raise ConversionError("vocab-size: must be given where no new tokenizer is. Pass one of the two.")
        if wanted == num_tokens:
            raise ConversionError(
                f"vocab-size: must be another than the model's, got vocab_size={wanted}, "
                f"{num_tokens} in {checkpoint.directory}. Pass another."
            )
        # range() of a negative number is empty: a smaller vocabulary only cuts rows off.
        return _Rows(
            num_old=num_tokens, num_kept=min(num_tokens, wanted), spellings=[[] for _ in range(wanted - num_tokens)]
        )
    num_old, spellings = _spell(checkpoint, vocabulary, num_tokens)
    # Never smaller than the model by default: making it smaller must be asked for.
    num_new = wanted or max(num_tokens, num_old + len(spellings))
    if num_new < num_old + len(spellings):
        raise ConversionError(
            f"vocab-size: must hold the new tokenizer's pieces, got vocab_size={num_new}, "
            f"{num_old + len(spellings)} pieces in {vocabulary.new_tokenizer_path}. Leave it out, or pass a larger one."
        )
    # Rows of the model after those of the old pieces stand for no token: new pieces take their place.
    spellings += [[] for _ in range(num_new - num_old - len(spellings))]
    return _Rows(num_old=num_old, num_kept=num_old, spellings=spellings)


def _spell(checkpoint: TrainingCheckpoint, vocabulary: NewVocabulary, num_tokens: int) -> tuple[int, list[list[int]]]:
    """(pieces of the old tokenizer, the old ids that spell each new piece)."""
    old_path = vocabulary.old_tokenizer_path or find_saved_tokenizer(checkpoint.args, checkpoint.directory)
    if old_path is None or vocabulary.new_tokenizer_path is None:
        raise ConversionError(
            "old-tokenizer-model: must be known to spell new pieces, got none that the checkpoint names. "
            "Pass --old-tokenizer-model."
        )
    old, new = load_extension(
        old_path,
        vocabulary.new_tokenizer_path,
        num_rows=num_tokens,
        rows=f"vocab_size={num_tokens:,} in {checkpoint.directory}",
        remedy="Pass the tokenizer that the model was trained with as --old-tokenizer-model.",
    )
    return old.vocab_size, list(spell_new_pieces(old, new))


def _plan_tensor(checkpoint: TrainingCheckpoint, key: str, rows: _Rows, args: Namespace) -> PlannedTensor:
    stored = checkpoint.store.tensors[key]
    shape = (args.padded_vocab_size, *stored.shape[1:])
    built: list[Tensor] = []  # the new rows, between the first and the last of the boxes

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One box of the new tensor: old rows, rows of new tokens, and zeros for the padding after them."""
        first, last = offsets[0], offsets[0] + sizes[0]
        box = read_rows(checkpoint, key, offsets, sizes, num_rows=rows.num_kept)
        begin, end = max(first, rows.num_kept), min(last, rows.num_tokens)
        if begin < end:
            if not built:
                built.append(_build_new_rows(checkpoint, key, rows))
            box[begin - first : end - first] = built[0][begin - rows.num_kept : end - rows.num_kept]
        # The new rows of one matrix are in memory at a time. Verifying reads the boxes again and builds them again.
        if last == shape[0]:
            built.clear()
        return box

    return PlannedTensor(key=key, shape=shape, dtype=stored.dtype, boxes=layout_of(args).cut(key, shape), read=read)


def _build_new_rows(checkpoint: TrainingCheckpoint, key: str, rows: _Rows) -> Tensor:
    """[new rows, h] in the tensor's dtype."""
    dtype, hidden_size = checkpoint.store.tensors[key].dtype, checkpoint.store.tensors[key].shape[1]
    parts = split_optimizer_key(key)
    # Moments of Adam: a new row has no gradient history.
    if parts and parts[0] not in _MASTER_KINDS:
        return torch.zeros(len(rows.spellings), hidden_size, dtype=dtype)
    masters = [f"optimizer.state.{kind}.{parameter_key(key)}" for kind in _MASTER_KINDS]
    # The mean of fp32 rows, rounded once. A mean of rounded rows would not be the rounded mean of the fp32 ones, and
    # the weights must stay the rounded fp32 copies.
    source = next((master for master in masters if master in checkpoint.optimizer), key)
    old = checkpoint.store.read(source, (0, 0), (rows.num_old, hidden_size))
    return build_new_rows(old, rows.spellings).to(dtype)
