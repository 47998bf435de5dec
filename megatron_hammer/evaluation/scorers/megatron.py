"""A checkpoint of Megatron, computed by Megatron's own model at any layout: one process, or TP and PP under torchrun.

The checkpoint may have been saved at another layout. The model is the one of the torch backend, which computes what
TransformerEngine's does. Only the log-probabilities leave the last pipeline stage; the vocabulary is never gathered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.convert.exported_vocabulary import select_vocabulary
from megatron_hammer.checkpoint.convert.fill_model import fill_chunks
from megatron_hammer.checkpoint_files.checkpoint_reader import CheckpointReader
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.saved_arguments import find_saved_tokenizer
from megatron_hammer.errors import CheckpointError, ConfigError
from megatron_hammer.evaluation.scorers.megatron_ranks import ModelLayout, ModelRanks
from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores, plan_batches, require_vocabulary
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder

Sequences = Sequence[Sequence[int]]


class MegatronScorer(Scorer):
    """See Scorer; made on every rank of `ranks`, and asked on rank 0 while `serve` runs on the others."""

    def __init__(
        self,
        path: Path,
        *,
        iteration: int | None,
        tokenizer_path: Path | None,
        layout: ModelLayout,
        ranks: ModelRanks,
        precision: str,
        max_batch_tokens: int,
    ):
        reader = open_checkpoint(path, iteration=iteration)
        self.encoder = load_encoder(find_tokenizer(reader, tokenizer_path))
        self.num_tokens = _count_tokens(reader, self.encoder)
        require_vocabulary(self.encoder, self.num_tokens, str(reader.directory))
        self.name = f"{path.absolute().name}@{reader.iteration}"
        self.num_trained_tokens = count_trained_tokens(reader.args)
        self.precision, self.max_batch_tokens = precision, max_batch_tokens
        self.max_length = reader.args.max_position_embeddings
        self._ranks, self._layout = ranks, layout
        self._model = _build_filled_model(reader, layout, precision, self.num_tokens)

    def score(self, sequences: Sequences, num_targets: Sequence[int] | None = None) -> list[TokenScores]:
        counts = self.count_targets(sequences, num_targets)
        return self._ranks.ask(self._compute, (list(map(list, sequences)), counts), len(sequences))

    def choose_next(self, sequences: Sequences) -> list[int]:
        return self._ranks.ask(self._compute, (list(map(list, sequences)), None), len(sequences))

    def serve(self) -> None:
        """On every rank but 0: compute what rank 0 asks for until it ends."""
        self._ranks.serve(self._compute)

    def _compute(self, request: tuple[list[list[int]], list[int] | None]) -> list[Any]:
        """This rank's answers; request: sequences, and of how many targets the scores are wanted, or the next token."""
        mine = slice(self._ranks.copy, None, self._ranks.num_copies)
        sequences, counts = request[0][mine], None if request[1] is None else request[1][mine]
        answers: list[Any] = [None] * len(sequences)
        for batch in plan_batches([len(ids) for ids in sequences], self.max_batch_tokens):
            rows = [sequences[number] for number in batch]
            wanted = None if counts is None else [counts[number] for number in batch]
            for number, answer in zip(batch, self._compute_batch(rows, wanted), strict=False):
                answers[number] = answer
        return answers if self._ranks.is_speaker else []

    @torch.inference_mode()
    def _compute_batch(self, sequences: list[list[int]], counts: list[int] | None) -> list[Any]:
        """Answers for one batch through Megatron's pipeline schedule; [] before the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        inputs = sequences if counts is None else [ids[:-1] for ids in sequences]
        length = max(map(len, inputs))
        num_micro_batches = min(self._layout.pipeline_model_parallel_size, len(inputs))
        size = math.ceil(len(inputs) / num_micro_batches)
        device = next(self._model.parameters()).device
        # Micro-batches have one shape: rows of padding fill the last one, and positions the ends of short sequences.
        tokens = torch.zeros(num_micro_batches * size, length, dtype=torch.int64)
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(ids)
        positions = torch.arange(length, device=device).expand(size, length)
        starts = iter(range(0, len(tokens), size))

        def forward(_: Any, model: Any) -> tuple[Tensor, Any]:
            start = next(starts)
            rows = slice(start, min(start + size, len(inputs)))

            def answer(logits: Tensor, non_loss_data: bool = True) -> list[Any]:
                return self._read_logits(logits, sequences[rows], None if counts is None else counts[rows])

            return model(tokens[start : start + size].to(device), positions, None), answer

        collected = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=[self._model],
            num_microbatches=num_micro_batches,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return [one for answers in collected for one in answers]

    def _read_logits(self, logits: Tensor, sequences: list[list[int]], counts: list[int] | None) -> list[Any]:
        """Answers for the rows of a micro-batch. logits [b, s, v / tp]: this rank's part of the padded vocabulary."""
        from megatron.core import parallel_state

        from megatron_hammer.model.cross_entropy import vocab_parallel_cross_entropy

        group = parallel_state.get_tensor_model_parallel_group()
        if counts is None:
            ends = torch.stack([row[len(ids) - 1] for row, ids in zip(logits, sequences, strict=False)])
            return choose_tokens(ends, num_tokens=self.num_tokens, group=group).tolist()
        answers = []
        for row, ids, count in zip(logits, sequences, counts, strict=False):
            scored = row[len(ids) - 1 - count : len(ids) - 1].contiguous()
            targets = torch.tensor(ids[-count:], device=row.device)
            losses = vocab_parallel_cross_entropy(
                scored[:, None], targets[:, None], num_tokens=self.num_tokens, group=group
            )
            is_greedy = choose_tokens(scored, num_tokens=self.num_tokens, group=group) == targets
            answers.append(TokenScores(-losses[:, 0].double().cpu().numpy(), is_greedy.cpu().numpy()))
        return answers


def choose_tokens(logits: Tensor, *, num_tokens: int, group: Any) -> Tensor:
    """Ids [n] of the likeliest tokens under logits [n, v / tp], without the padding of the vocabulary."""
    first_column = group.rank() * logits.shape[1]
    own = logits[:, : max(num_tokens - first_column, 0)]
    if own.shape[1]:
        maxima, ids = own.float().max(-1)
    else:  # this rank has padding alone
        maxima = logits.new_full(logits.shape[:1], -torch.inf, dtype=torch.float32)
        ids = torch.zeros_like(maxima, dtype=torch.int64)
    if group.size() == 1:
        return ids
    # fp64 holds both a logit and an id exactly, so one message carries both.
    pairs = torch.stack([maxima.double(), (ids + first_column).double()])
    gathered = [torch.empty_like(pairs) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, pairs, group=group)
    stacked = torch.stack(gathered)
    # argmax finds the first maximum; the ranks are in the order of the ids.
    return stacked[:, 1].gather(0, stacked[:, 0].argmax(0)[None])[0].long()


@dataclass(frozen=True, slots=True)
class _StoredPair:
    """A tensor of the checkpoint, as fill_model asks for it."""

    megatron_name: str
    num_elements: int

    @property
    def hf_names(self) -> tuple[str]:
        return (self.megatron_name,)


class _StoredWeights:
    """An opened checkpoint as a source of fill_model."""

    def __init__(self, reader: CheckpointReader):
        self._reader, self.folder = reader, reader.directory
        self.pairs = [_StoredPair(name, math.prod(stored.shape)) for name, stored in reader.tensors.items()]

    def read_pair(self, pair: _StoredPair) -> Tensor:
        return self._reader.read(pair.megatron_name)


def _build_filled_model(reader: CheckpointReader, layout: ModelLayout, precision: str, num_tokens: int) -> Any:
    """This rank's part of the checkpoint's model, with its weights; raises CheckpointError where they do not fit."""
    from megatron.core import parallel_state

    from megatron_hammer.checkpoint.verification.megatron_model import build_model, read_model_arguments

    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    if reader.args.num_layers % pp:
        possible = [number for number in range(1, reader.args.num_layers + 1) if reader.args.num_layers % number == 0]
        raise ConfigError(
            f"pipeline-model-parallel-size: must divide num_layers={reader.args.num_layers} of {reader.directory}, "
            f"got {pp}. Pass one of {', '.join(map(str, possible))}."
        )
    reader.remove_vocab_padding(num_tokens)
    namespace = read_model_arguments(
        reader.saved_args,
        platform=layout.platform,
        precision=precision,
        vocab_size=num_tokens,
        # Equal parts for all ranks; the rows behind the tokens are never read.
        padded_vocab_size=math.ceil(num_tokens / tp) * tp,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        global_batch_size=parallel_state.get_data_parallel_world_size(),
    )
    model = build_model(namespace)
    if layout.platform == "cuda":
        model = model.cuda()
    metadata = {"singleton_local_shards": False, "dp_cp_group": parallel_state.get_data_parallel_group()}
    fill_chunks([model], _StoredWeights(reader), metadata=metadata)
    return model


def find_tokenizer(reader: CheckpointReader, asked: Path | None) -> Path:
    """The tokenizer to use: the one asked for, else the checkpoint's; raises CheckpointError if there is neither."""
    found = asked or find_saved_tokenizer(reader.args, reader.directory)
    if found is None or not found.exists():
        named = found or getattr(reader.args, "tokenizer_model", None)
        raise CheckpointError(
            f"{reader.directory}: tokenizer must exist, got {named or 'none in its arguments'}. Pass --tokenizer-model."
        )
    return found


def count_trained_tokens(args: Any) -> int | None:
    """Tokens that a run with these saved arguments had trained on; None where they do not say."""
    num_samples, length = getattr(args, "consumed_train_samples", None), getattr(args, "seq_length", None)
    return num_samples * length if num_samples and length else None


def _count_tokens(reader: CheckpointReader, encoder: Encoder) -> int:
    """Of the vocabulary without its padding."""
    choice = select_vocabulary(reader.args, asked=None, tokenizer_path=encoder.path)
    num_rows = reader.tensors["embedding.word_embeddings.weight"].shape[0]
    return min(choice.num_tokens or num_rows, num_rows)
