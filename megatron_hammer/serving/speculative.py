"""Speculative decoding: a small draft model proposes several tokens, which the large model checks in one pass.

The answer is what the large model alone gives; only the time differs, in either direction. llama.cpp does the work.
Here are the checks before it, its parameters, and the arithmetic of what can be gained.
Source of the arithmetic: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding". They take
the verification of several tokens to cost as much as one token, which holds on GPUs at small batches; here it is a
number, because on CPUs it costs more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.gguf.header import read_gguf_header
from megatron_hammer.errors import ConfigError

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
DEFAULT_DRAFT_TOKENS = 4
_UNUSED = 5  # llama.cpp's LLAMA_TOKEN_TYPE_UNUSED: rows that pad the embedding
# Both models see the same ids, so these must agree too. Absent ones have the same defaults in both.
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
_ADDED = ("add_bos_token", "add_eos_token")
_TYPE_NAMES = {1: "normal", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "byte"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftOptions:
    """path: a GGUF file. num_tokens: proposed at a time, at most."""

    path: Path
    num_tokens: int = DEFAULT_DRAFT_TOKENS


def build_draft_parameters(
    target_path: Path, draft: DraftOptions, *, context_tokens: int, num_threads: int | None = None
) -> dict[str, Any]:
    """Check that the draft can propose tokens to the target; returns attributes of xllamacpp's CommonParams by path.

    context_tokens: of one conversation. Raises ConfigError if the vocabularies differ or the draft has fewer positions.
    """
    if draft.num_tokens < 1:
        raise ConfigError(f"draft-tokens: must be at least 1, got {draft.num_tokens}. Pass 2 to 8.")
    headers = [read_gguf_header(path, arrays=(_TOKENS, _TYPES)) for path in (target_path, draft.path)]
    problems = list_vocabulary_differences(*headers)
    positions = int(headers[1].get(f"{headers[1].get('general.architecture')}.context_length", context_tokens))
    if positions < context_tokens:
        problems.append(
            f"draft-model: must have a position for each of the {context_tokens:,} tokens of the context, "
            f"got {positions:,}. Pass --context {positions}, or another draft model."
        )
    if problems:
        raise ConfigError(*(f"{draft.path}: {problem}" for problem in problems))
    threads = (
        {} if num_threads is None else {"cpuparams.n_threads": num_threads, "cpuparams_batch.n_threads": num_threads}
    )
    values = {"mparams.path": str(draft.path.resolve()), "n_max": draft.num_tokens, **threads}
    return {
        "speculative.types": ["COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE"],
        **{f"speculative.draft.{name}": value for name, value in values.items()},
    }


def list_vocabulary_differences(target: Mapping[str, Any], draft: Mapping[str, Any]) -> list[str]:
    """A sentence for every kind of difference, with the first one of it. target, draft: headers with their tokens.

    llama.cpp would translate between vocabularies by text, slowly and with fewer accepted tokens.
    """
    remedy = "Train the draft with the target's tokenizer."
    tokens, draft_tokens = target.get(_TOKENS, []), draft.get(_TOKENS, [])
    if differing := [
        number for number, (one, other) in enumerate(zip(tokens, draft_tokens, strict=False)) if one != other
    ]:
        first = differing[0]
        # Another tokenizer: what else differs follows from it.
        return [
            f"draft-model: token {first} must be {tokens[first]!r} as in the target, got {draft_tokens[first]!r}, "
            f"the first of {len(differing):,} that differ. {remedy}"
        ]
    problems = _list_extra_tokens(target, draft, remedy)
    types = list(zip(target.get(_TYPES, []), draft.get(_TYPES, []), strict=False))
    if other := [number for number, (one, two) in enumerate(types) if one != two]:
        first = other[0]
        expected, got = (_TYPE_NAMES.get(kind, kind) for kind in types[first])
        problems.append(
            f"draft-model: token {first}, {tokens[first]!r}, must be {expected} as in the target, got {got}, "
            f"the first of {len(other):,} that differ. {remedy}"
        )
    for name in (*_SPECIAL_IDS, *_ADDED):
        one, two = (header.get(f"tokenizer.ggml.{name}") for header in (target, draft))
        if one != two:
            problems.append(f"draft-model: {name} must be {one} as in the target, got {two}. {remedy}")
    return problems


def _list_extra_tokens(target: Mapping[str, Any], draft: Mapping[str, Any], remedy: str) -> list[str]:
    """Tokens that only one of them has. Rows that pad an embedding are none: a model is padded by its own layout."""
    lengths = [len(header.get(_TOKENS, [])) for header in (target, draft)]
    shorter = min(lengths)
    longer, owner = (target, "the target") if lengths[0] > shorter else (draft, "the draft")
    extra = [number for number in range(shorter, max(lengths)) if _read_type(longer, number) != _UNUSED]
    if not extra:
        return []
    return [
        f"draft-model: both must have the same tokens, got {lengths[0]:,} in the target and {lengths[1]:,} "
        f"in the draft; token {extra[0]}, {longer[_TOKENS][extra[0]]!r}, is only in {owner}. {remedy}"
    ]


def _read_type(header: Mapping[str, Any], number: int) -> int | None:
    types: Sequence[int] = header.get(_TYPES, [])
    return types[number] if number < len(types) else None


def estimate_speedup(
    tokens_per_pass: float, num_draft_tokens: int, *, draft_cost: float, verification_cost: float = 1.0
) -> float:
    """How many times as fast as the target alone. Costs are in units of the target's time for one token.

    draft_cost: of one token of the draft. verification_cost: of a pass of the target over all proposed tokens and one.
    """
    return tokens_per_pass / (num_draft_tokens * draft_cost + verification_cost)


def compute_break_even_cost(tokens_per_pass: float, num_draft_tokens: int, *, verification_cost: float = 1.0) -> float:
    """The cost of a draft token, in target tokens, at which nothing is gained; negative: no draft is cheap enough."""
    return (tokens_per_pass - verification_cost) / num_draft_tokens
