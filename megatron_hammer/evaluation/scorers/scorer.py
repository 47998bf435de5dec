"""The interface to a language model that every evaluation uses: log-probabilities of given tokens, greedy generation.

Perplexity and benchmarks know nothing else of a model, so a number means the same whether transformers, Megatron or
llama.cpp computes it. `use_scorer` in open_scorer.py opens a model of each kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.errors import ConfigError
from megatron_hammer.tokenizer.encoding.encoder import Encoder


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of the n scored tokens of one sequence, in their order.

    log_probabilities [n]: natural, computed in fp32, as float64; NaN where the model computes NaN.
    is_greedy [n]: whether the token was the model's likeliest, the first of equally likely ones.
    """

    log_probabilities: np.ndarray
    is_greedy: np.ndarray


class Scorer(ABC):
    """One opened model.

    name: for tables. max_length: tokens that it reads at once. encoder: its tokenizer, which adds neither BOS nor EOD;
    their ids are `encoder.bos_id` and `encoder.eod_id`. precision: of the arithmetic, for tables. num_trained_tokens:
    how many tokens it was trained on; None where that is not known.
    """

    name: str
    max_length: int
    encoder: Encoder
    precision: str
    num_trained_tokens: int | None = None

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]], num_targets: Sequence[int] | None = None) -> list[TokenScores]:
        """Score every token of each sequence but the first, given all tokens before it.

        sequences: of 2 to `max_length` + 1 ids each; the last id is only a target. num_targets: how many of the last
        tokens of each sequence to score; None: all but the first. Raises ValueError for another length.
        """

    @abstractmethod
    def choose_next(self, sequences: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest next token of each sequence of 1 to `max_length` ids; the first of equally likely ones."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, is_done: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Continue each prompt greedily, for at most `max_new_tokens` tokens or until `max_length` is reached.

        is_done: called with the new ids of a prompt after each of them; its last id is kept. Every step reads the whole
        sequence again, which every layout can do.
        """
        continuations: list[list[int]] = [[] for _ in prompts]
        left = [number for number, prompt in enumerate(prompts) if len(prompt) <= self.max_length]
        for _ in range(max_new_tokens):
            if not left:
                break
            chosen = self.choose_next([[*prompts[number], *continuations[number]] for number in left])
            for number, token in zip(left, chosen, strict=True):
                continuations[number].append(token)
            left = [
                number
                for number in left
                if not is_done(continuations[number])
                and len(prompts[number]) + len(continuations[number]) <= self.max_length
            ]
        return continuations

    def count_targets(self, sequences: Sequence[Sequence[int]], num_targets: Sequence[int] | None) -> list[int]:
        """How many tokens `score` must score of each sequence; raises ValueError if a sequence cannot be read."""
        counts = [len(ids) - 1 for ids in sequences] if num_targets is None else list(num_targets)
        for ids, count in zip(sequences, counts, strict=True):
            if not 1 <= count < len(ids) <= self.max_length + 1:
                raise ValueError(f"cannot score {count} of {len(ids)} tokens with max_length={self.max_length}")
        return counts


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Numbers of sequences in batches of similar length, the longest first, so that little is padded.

    A batch has at most `max_tokens` tokens with its padding, or a single sequence.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        # The first sequence of a batch is its longest, to whose length the others are padded.
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def require_vocabulary(encoder: Encoder, num_tokens: int, where: str) -> None:
    """Raise ConfigError if the tokenizer can give ids that the model does not have."""
    if encoder.vocab_size > num_tokens:
        raise ConfigError(
            f"{encoder.path}: ids must be below the {num_tokens:,} tokens of {where}, got ids up to "
            f"{encoder.vocab_size - 1:,}. Pass the model's own tokenizer with --tokenizer-model."
        )
