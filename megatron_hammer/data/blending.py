"""Weights of a blend, and what a run of a given length would draw from each of its sources.

The weights follow token counts (w ~ tokens^(1/T)) or are given; sources may be capped at a number of epochs, with the
excess going to the others. The preview says what megatron-core does with the result: BlendedDataset draws sample n from
the source that lags most behind its weight, so every source's share is met within one sample at any length, and
GPTDataset lays out as many whole epochs as the samples asked of it need.
Source: megatron/core/datasets/{helpers.cpp,blended_megatron_dataset_builder.py,gpt_dataset.py}; pinned by
tests/unit/data/test_blending.py, which builds them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.corpus.file_search import identify_file
from megatron_hammer.data.indexed.manifest import TokenizerIdentity, read_manifest
from megatron_hammer.data.indexed.pair import idx_path, read_index
from megatron_hammer.data.order.order import normalize_weights, plan_epochs, share_samples
from megatron_hammer.data.sources import DataPlan, count_split_tokens, parse_blend, parse_split
from megatron_hammer.errors import ConfigError, DataError

# BlendedMegatronDatasetConfig.mid_level_dataset_surplus: what Megatron builds beyond the samples that it needs.
MID_LEVEL_DATASET_SURPLUS = 0.005
# Enough that a share of a run of 10^9 samples is right to one sample, and short enough for a command line.
WEIGHT_DIGITS = 9
DEFAULT_MAX_EPOCHS = 4.0
LARGEST_BLEND_BYTES = 1 << 20  # thousands of sources


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendSource:
    """A .bin/.idx pair; num_tokens: those of its training split."""

    name: str
    prefix: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Length of a run."""

    num_samples: int
    seq_length: int

    @property
    def num_tokens(self) -> int:
        return self.num_samples * self.seq_length


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePreview:
    """What a run draws from one source. num_epochs_built: whole epochs that GPTDataset lays out and shuffles."""

    num_samples: int
    num_tokens: int
    epochs: float
    num_epochs_built: int


def read_sources(words: Sequence[str], split: str | None = None) -> tuple[BlendSource, ...]:
    """Read the headers of the pairs, each given as PREFIX or NAME=PREFIX, and count the tokens of the training split.

    split: as for --split, or None where all of a pair is for training.
    Raises DataError listing every pair that is missing, damaged, named twice or without training tokens, and where
    manifests name different tokenizers; ConfigError for a split that cannot be read.
    """
    bounds = _read_train_bounds(split)
    problems: list[str] = []
    sources: list[BlendSource] = []
    tokenizers: dict[str, TokenizerIdentity] = {}
    seen: dict[object, str] = {}
    named: set[str] = set()
    for name, prefix in map(split_name, words):
        try:
            num_tokens = count_split_tokens(read_index(prefix), bounds)
            manifest = read_manifest(prefix)
            known = seen.setdefault(identify_file(idx_path(prefix)), prefix)
        except DataError as error:
            problems.extend(error.problems)
            continue
        if known != prefix or prefix in named:
            twice = "twice" if known == prefix else f"as {known} too"
            problems.append(
                f"{prefix}: source must be named once, got it {twice}. Drop one, and give it a larger weight."
            )
            continue
        named.add(prefix)
        if num_tokens == 0:
            problems.append(f"{prefix}: training split must hold tokens, got 0. Leave it out, or change --split.")
        if manifest is not None:
            tokenizers[prefix] = manifest.tokenizer
        sources.append(BlendSource(name=name, prefix=prefix, num_tokens=num_tokens))
    problems += _find_tokenizer_problems(tokenizers)
    if problems:
        raise DataError(*problems)
    return tuple(sources)


def split_name(word: str) -> tuple[str, str]:
    """Split NAME=PREFIX; a prefix alone is named after its last part."""
    name, equals, prefix = word.partition("=")
    # A prefix may contain "=" itself. Where a pair of that whole name exists, the word is not split.
    if equals and name and prefix and "/" not in name and not idx_path(word).exists():
        return name, prefix
    return Path(word).name, word


def _read_train_bounds(split: str | None) -> tuple[float, float]:
    if split is None:
        return 0.0, 1.0
    shares, problems = parse_split(split)
    if problems:
        raise ConfigError(*problems)
    return DataPlan(split=shares).bounds_of("train")


def _find_tokenizer_problems(tokenizers: dict[str, TokenizerIdentity]) -> list[str]:
    # By content, not by name: the same file may lie under two names.
    if len({tokenizer.sha256 for tokenizer in tokenizers.values()}) < 2:
        return []
    found = ", ".join(f"{prefix} by {t.name} ({t.sha256[:8]})" for prefix, t in tokenizers.items())
    return [f"sources: must be encoded by one tokenizer, got {found}. Preprocess them with the same one."]


def weigh_by_tokens(num_tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Return weights that sum to 1, in proportion to tokens^(1/T): T=1 by size, a large T nearly uniform: float64 [n].

    Raises ConfigError unless the temperature is positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature: must be positive and finite, got {temperature}. Pass --temperature 1.")
    # In logarithms: tokens^(1/T) overflows for a small T.
    logarithms = np.log(np.array(num_tokens, dtype=np.float64)) / temperature
    return normalize_weights(np.exp(logarithms - logarithms.max()))  # the largest is 1: nothing overflows


def validate_weights(weights: Sequence[float], num_sources: int) -> None:
    """Raises ConfigError unless there is one positive, finite weight for each source."""
    if len(weights) != num_sources:
        raise ConfigError(
            f"weights: must be one for each source, got {len(weights)} weights and {num_sources} sources. "
            "Give every source a weight."
        )
    bad = [weight for weight in weights if not 0 < weight < math.inf]
    if bad:
        raise ConfigError(f"weights: must be positive and finite, got {bad[0]}. Leave out a source that is not wanted.")


def cap_weights(weights: np.ndarray, num_tokens: Sequence[int], budget: Budget, max_epochs: float) -> np.ndarray:
    """Lower the weights of sources that would be read more than `max_epochs` times, and raise the others' alike.

    Water filling: the result is min(cap, level * weight) with the one level at which it sums to 1.
    weights: float64 [n], summing to 1. Returns the same. Raises ConfigError if all sources together hold too little.
    """
    caps = np.array(num_tokens, dtype=np.float64) * max_epochs / budget.num_tokens
    if caps.sum() < 1:
        raise ConfigError(
            f"train-tokens: must be at most {int(caps.sum() * budget.num_tokens):,}, all sources read {max_epochs:g} "
            f"times, got {budget.num_tokens:,}. Add data, lower the budget, or raise --max-epochs."
        )
    capped = weights.copy()
    is_full = np.zeros(len(weights), dtype=bool)
    # Each round fills some sources up to their caps, and the others share the rest. So there is at most one round
    # per source.
    while True:
        free_weight = weights[~is_full].sum()
        if free_weight > 0:
            capped[~is_full] = weights[~is_full] / free_weight * (1 - caps[is_full].sum())
        is_over = ~is_full & (capped > caps)
        if not is_over.any():
            return normalize_weights(capped)
        capped[is_over] = caps[is_over]
        is_full |= is_over


def round_weights(weights: np.ndarray) -> tuple[str, ...]:
    """Return the weights as they are written into a command line."""
    return tuple(f"{weight:.{WEIGHT_DIGITS}g}" for weight in weights)


def preview_blend(weights: Sequence[str], sources: Sequence[BlendSource], budget: Budget) -> tuple[SourcePreview, ...]:
    """Say what a run with these weights, as written, draws from each source.

    num_samples is within one of what BlendedDataset draws; num_epochs_built is what GPTDataset lays out.
    Raises DataError naming every source whose training split does not hold one sample.
    """
    problems = [
        f"{source.prefix}: training split must hold one sample (seq_length + 1 tokens), "
        f"got {source.num_tokens} tokens, seq_length={budget.seq_length}. Leave it out, or lower --seq-length."
        for source in sources
        if source.num_tokens <= budget.seq_length
    ]
    if problems:
        raise DataError(*problems)
    # The weights as they are written, not as they were computed: the run reads the rounded text.
    shares = normalize_weights([float(weight) for weight in weights]).tolist()
    return tuple(_preview_source(share, source, budget) for share, source in zip(shares, sources, strict=True))


def _preview_source(share: float, source: BlendSource, budget: Budget) -> SourcePreview:
    num_samples = round(share * budget.num_samples)
    # One source at a time: the number asked of a source depends on its own share alone.
    (num_requested,) = share_samples(budget.num_samples, [share], surplus=MID_LEVEL_DATASET_SURPLUS)
    return SourcePreview(
        num_samples=num_samples,
        num_tokens=num_samples * budget.seq_length,
        epochs=num_samples * budget.seq_length / source.num_tokens,
        num_epochs_built=plan_epochs(num_requested, source.num_tokens, budget.seq_length).num_epochs,
    )


def find_warnings(
    previews: Sequence[SourcePreview], sources: Sequence[BlendSource], budget: Budget, max_epochs: float
) -> list[str]:
    """Sources that would be read too often, or not at all."""
    warnings = []
    for preview, source in zip(previews, sources, strict=True):
        if preview.epochs > max_epochs + budget.seq_length / source.num_tokens:  # a sample more is rounding
            warnings.append(
                f"{source.name}: is read {preview.epochs:.2f} times, more than max_epochs={max_epochs:g}. "
                "Lower its weight, pass --cap-epochs, or add data."
            )
        if preview.num_samples == 0:
            warnings.append(
                f"{source.name}: nothing of it is drawn in {budget.num_samples} samples. "
                "Raise its weight, or leave it out."
            )
    return warnings


def list_data_path(weights: Sequence[str], sources: Sequence[BlendSource]) -> list[str]:
    """Return what follows --data-path: weight, prefix, weight, prefix...; raises ConfigError if that cannot be read."""
    words = [word for weight, source in zip(weights, sources, strict=True) for word in (weight, source.prefix)]
    # What is printed here is read by the same rules at training: a prefix that looks like a number is refused.
    _, problems = parse_blend("data-path", words)
    if problems:
        raise ConfigError(*problems)
    return words


def encode_data_args(weights: Sequence[str], sources: Sequence[BlendSource]) -> bytes:
    """Return the content of a file for --data-args-path; raises ConfigError for a prefix that holds white space."""
    for source in sources:
        if len(source.prefix.split()) != 1:
            raise ConfigError(
                f"output: a file for --data-args-path cannot hold white space in a prefix, got {source.prefix!r}. "
                "Rename it, or pass it as --data-path."
            )
    words = list_data_path(weights, sources)
    return "".join(f"{weight} {prefix}\n" for weight, prefix in zip(words[::2], words[1::2], strict=True)).encode()


def is_blend_file(path: Path) -> bool:
    """Whether a file is what `encode_data_args` writes, which another blend may replace."""
    if path.stat().st_size > LARGEST_BLEND_BYTES:
        return False
    try:
        sources, problems = parse_blend("output", path.read_text(encoding="utf-8").split())
    except ValueError:  # no text
        return False
    return not problems and all(source.weight is not None for source in sources)
