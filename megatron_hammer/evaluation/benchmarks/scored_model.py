"""lm-eval's view of a scorer: requests of text in, log-likelihoods and continuations out.

What is tokenized, cut and scored is what lm-eval's own class for transformers does (HFLM), so both give the same
numbers; tests/numerics/test_benchmarks_vs_lm_eval.py compares them.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_hammer.errors import CheckpointError, ConfigError, ConversionError
from megatron_hammer.evaluation.scorers.scorer import Scorer, TokenScores
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

DEFAULT_NEW_TOKENS = 256  # lm-eval's, for tasks that do not say how many
SEQUENCES_AT_ONCE = 256  # that the scorer is asked for, between two moves of the progress bar


class ScoredModel(TemplateLM):  # type: ignore[misc]
    """See TemplateLM. first_id: the token before every text, if any. tokenizer: transformers', of a chat model only."""

    def __init__(self, scorer: Scorer, *, first_id: int | None, tokenizer: Any = None):
        super().__init__()
        self.scorer, self.tokenizer = scorer, tokenizer
        self._first = [] if first_id is None else [first_id]
        self.max_length = scorer.max_length
        self._bos_id, self._eod_id = scorer.encoder.bos_id, scorer.encoder.eod_id
        if self._bos_id is None and self._eod_id is None:
            raise ConfigError(
                f"{scorer.encoder.path}: tokenizer must have a token that begins or ends a text, got none. "
                "Pass --tokenizer-model with BOS or EOS."
            )

    @property
    def eot_token_id(self) -> int | None:
        return self._eod_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without a context is scored after: BOS, else EOD."""
        prefix = self._eod_id if self._bos_id is None else self._bos_id
        assert prefix is not None
        return prefix

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.encoder.sha256

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def render(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        try:
            return render(chat_history)
        except TemplateError:
            if chat_history[0]["role"] != "system" or len(chat_history) < 2:
                raise
            # A template without a system role. What the task says there must not be lost, so the user says it.
            system, user, *rest = chat_history
            return render([{**user, "content": f"{system['content']}{user['content']}"}, *rest])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        first = [] if add_special_tokens is False else self._first
        if self.tokenizer is None:
            return [*first, *map(int, self.scorer.encoder.encode(string))]
        # A rendered conversation has the special tokens of its template in it, BOS among them.
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        has_own = has_bos_prefix(string, self.tokenizer.bos_token)
        return ids if has_own else [*first, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # lm-eval asks for its bar in so many words, which outweighs TQDM_DISABLE.
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=not sys.stderr.isatty())
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        # Each choice of a question is a sequence; equal ones, as few-shot prompts often have, are scored once.
        cut = [((context + answer)[-(self.max_length + 1) :], len(answer)) for _, context, answer in requests]
        for (_, context, _), (ids, num_targets) in zip(requests, cut, strict=True):
            if not num_targets:
                raise ConfigError("tasks: an answer must have a token, got an empty one. Remove its question.")
            if num_targets >= len(ids):
                raise ConfigError(
                    f"tasks: an answer must have 1 to {self.max_length} tokens after its context, got {num_targets} "
                    f"after {len(context)}. Evaluate this task with a model of a longer context."
                )
        # The longest first: memory runs out at once if it does, and batches are of similar length.
        distinct = sorted({(tuple(ids), num_targets) for ids, num_targets in cut}, key=lambda key: (-len(key[0]), key))
        known = {}
        for start in tqdm(range(0, len(distinct), SEQUENCES_AT_ONCE), desc="Scoring", unit_scale=SEQUENCES_AT_ONCE):
            keys = distinct[start : start + SEQUENCES_AT_ONCE]
            scores = self.scorer.score([ids for ids, _ in keys], [num_targets for _, num_targets in keys])
            for key, score in zip(keys, scores, strict=True):
                known[key] = self._sum(score), bool(score.is_greedy.all())
        return [known[tuple(ids), num_targets] for ids, num_targets in cut]

    def _sum(self, score: TokenScores) -> float:
        total = float(score.log_probabilities.sum())
        if math.isnan(total):  # of which lm-eval would take the first option
            raise CheckpointError(
                f"{self.scorer.name}: log-probabilities must be numbers, got NaN. Choose an earlier checkpoint, or "
                "pass --precision fp32."
            )
        return total

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(number, *make_disjoint_window(window)) for window in rolling]
        totals = [0.0] * len(requests)
        for (number, _, _), (value, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily up to the task's stop sequences; raises ConfigError if a task samples."""
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            options = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], DEFAULT_NEW_TOKENS))
            if options["do_sample"]:
                raise ConfigError(
                    f"tasks: generation must be greedy, got do_sample with temperature {options.get('temperature')}. "
                    "Set do_sample: false in the task's generation_kwargs."
                )
            stops = handle_stop_sequences(list(options["until"]), eos=None)
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._continue(contexts, options["max_gen_toks"], stops), strict=True):
                texts[number] = text
        return texts

    def _continue(self, contexts: Sequence[str], max_new_tokens: int, stops: Sequence[str]) -> list[str]:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"tasks: new tokens must be fewer than the {self.max_length} that the model reads, got "
                f"{max_new_tokens}. Pass fewer --max-new-tokens."
            )
        ends = self._list_ends()

        def is_done(ids: list[int]) -> bool:
            return ids[-1] in ends or any(stop in self._decode(ids) for stop in stops)

        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        if len(first := prompts[0]) > 1:  # a model that computes NaN continues as any other
            self._sum(self.scorer.score([first], [1])[0])
        found = self.scorer.generate(prompts, max_new_tokens=max_new_tokens, is_done=is_done)
        kept = [ids[:-1] if ids and ids[-1] in ends else ids for ids in found]
        return [postprocess_generated_text(self._decode(ids), list(stops), None) for ids in kept]

    def _list_ends(self) -> set[int]:
        """Tokens that end an answer: EOD, and what the chat template ends a turn with where it is EOS."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return {token for token in (self._eod_id, own) if token is not None}

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            encoder = self.scorer.encoder
            # Models have more rows than tokens; such an id has no text, as in transformers.
            return encoder.decode([token for token in ids if token < encoder.vocab_size])
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; raises ConfigError if it does not load."""
    try:
        return load_with_transformers(folder)
    except ConversionError as error:
        reason = (str(error.__cause__) or repr(error.__cause__)).splitlines()[0]
        raise ConfigError(
            f"{folder}: transformers must load the tokenizer, got: {reason}. "
            "Pass the exported folder, or --tokenizer-model FOLDER."
        ) from error


def load_chat_tokenizer(folder: Path) -> Any:
    """As `load_tokenizer`, with a chat template; raises ConfigError without one."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{folder}: tokenizer must have a chat template for --apply-chat-template, got none. "
            "Export it with one, or drop the flag for a base model."
        )
    return tokenizer
