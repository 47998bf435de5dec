"""The losses of documents under one model: what stands before a document, how long ones are cut, and what is summed."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.evaluation.perplexity.domains import Domain
from megatron_hammer.evaluation.perplexity.formula import DocumentLosses
from megatron_hammer.evaluation.scorers.scorer import Scorer
from megatron_hammer.tokenizer.encoding.encoder import Encoder

BOS_POLICIES = ("auto", "bos", "eod", "none")
WINDOWS_AT_ONCE = 256  # sent to a scorer, which sorts them by length
NUM_TRIED = 8  # documents of each domain on which another token in front is tried
NOTICED_RATIO = 0.98  # of the loss with the other token, below which a note says so


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureOptions:
    """bos: of BOS_POLICIES. max_length: tokens of a window; None: what the model reads. stride: tokens that each
    further window scores; None: as many as it has.
    """

    bos: str = "auto"
    max_length: int | None = None
    stride: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScores:
    """note: of the Domain. bad_documents: where the model gave no finite number, as `file:line`. num_tokens: scored, of
    the model's own.
    """

    name: str
    note: str
    losses: DocumentLosses
    num_tokens: int
    bad_documents: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelScores:
    """One row of the tables. prefix: which token stands before each document: BOS, EOD or none. run: of NamedModel."""

    name: str
    num_trained_tokens: int | None
    precision: str
    prefix: str
    max_length: int
    stride: int
    domains: tuple[DomainScores, ...]
    notes: tuple[str, ...]
    run: str | None = None


class ReferenceTokenizer:
    """The tokenizer whose tokens perplexity counts, for all models.

    Each domain is counted once: the tokenizer of a GGUF file works only while its model is open.
    """

    def __init__(self, encoder: Encoder):
        self.path = encoder.path
        self._encoder = encoder
        self._counts: dict[str, list[int]] = {}

    def count_tokens(self, domain: Domain) -> list[int]:
        """Of every document."""
        if domain.name not in self._counts:
            self._counts[domain.name] = [len(self._encoder.encode(one.text)) for one in domain.documents]
        return self._counts[domain.name]


def choose_prefix(encoder: Encoder, policy: str) -> tuple[str, int | None]:
    """Name and id of the token before each document, None for none, where the first token is then not scored.

    auto: BOS where the tokenizer has one, else the token that ends documents, as lm-eval does. Raises ConfigError if
    the tokenizer has no such token.
    """
    ids = {"BOS": encoder.bos_id, "EOD": encoder.eod_id}
    names = {"auto": ("BOS", "EOD"), "bos": ("BOS",), "eod": ("EOD",), "none": ()}[policy]
    for name in names:
        if ids[name] is not None:
            return name, ids[name]
    if policy == "none":
        return "none", None
    raise ConfigError(f"{encoder.path}: tokenizer must have {' or '.join(names)}, got neither. Pass --bos none.")


def cut_windows(ids: Sequence[int], max_length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Sequences of at most `max_length` + 1 ids, each with how many of its last tokens it scores.

    Every token but the first is scored once: by the first window as many as it has, then `stride` by each, with all
    earlier tokens that fit before them. With stride=max_length these are lm-eval's windows.
    """
    num_done = 1
    while num_done < len(ids):
        end = min(len(ids), num_done + (max_length if num_done == 1 else stride))
        yield list(ids[max(0, end - max_length - 1) : end]), end - num_done
        num_done = end


def measure_model(
    scorer: Scorer,
    domains: Sequence[Domain],
    options: MeasureOptions,
    *,
    reference: ReferenceTokenizer,
    on_progress: Callable[[str, int, int | None], None] = lambda name, done, total: None,
) -> ModelScores:
    """Score all documents. reference: the tokenizer whose tokens are counted.

    on_progress: called with the domain, how many of its documents are done, and how many it has. Raises ConfigError for
    a window that the model cannot read.
    """
    prefix_name, prefix = choose_prefix(scorer.encoder, options.bos)
    max_length = options.max_length or scorer.max_length
    stride = options.stride or max_length
    if not 1 <= stride <= max_length <= scorer.max_length:
        raise ConfigError(
            f"stride, max-length: must be 1 <= stride <= max-length <= {scorer.max_length} of {scorer.name}, got "
            f"stride={stride}, max-length={max_length}. Pass smaller ones."
        )
    measured: list[DomainScores] = []
    notes: list[str] = []
    for domain in domains:
        encoded = [scorer.encoder.encode(document.text).tolist() for document in domain.documents]
        whole = encoded if prefix is None else [[prefix, *ids] for ids in encoded]
        show = functools.partial(_show, on_progress, domain.name, len(whole))
        nats = _sum_losses(scorer, whole, max_length, stride, show)
        # The first token is only read where nothing stands before it, so it is not counted either.
        counts = [max(0, count - (prefix is None)) for count in reference.count_tokens(domain)]
        notes += _list_changed_texts(scorer, domain, encoded)
        measured.append(_build_scores(domain, nats, counts, sum(max(0, len(ids) - 1) for ids in whole)))
    return ModelScores(
        name=scorer.name,
        num_trained_tokens=scorer.num_trained_tokens,
        precision=scorer.precision,
        prefix=prefix_name,
        max_length=max_length,
        stride=stride,
        domains=tuple(measured),
        notes=(*notes, *(_try_other_prefix(scorer, domains, prefix_name, max_length) if options.bos == "auto" else ())),
    )


def _list_changed_texts(scorer: Scorer, domain: Domain, encoded: Sequence[list[int]]) -> Iterator[str]:
    """A note where the tokenizer does not give texts back: then the loss is that of other, easier texts."""
    # White space may change at the ends of a text alone, where some tokenizers add a space.
    changed = [
        f"{one.source}:{one.line}"
        for one, ids in zip(domain.documents, encoded, strict=True)
        if scorer.encoder.decode(ids).strip() != one.text.strip()
    ]
    if changed:
        yield (
            f"{scorer.name}: {len(changed):,} of {len(encoded):,} documents of {domain.name} lose characters in its "
            f"tokenizer, the first at {changed[0]}; do not compare this figure with other tokenizers"
        )


def _show(on_progress: Callable[[str, int, int | None], None], name: str, total: int, done: int) -> None:
    on_progress(name, done, total)


def _build_scores(domain: Domain, nats: np.ndarray, num_reference_tokens: list[int], num_tokens: int) -> DomainScores:
    if not sum(num_reference_tokens):
        raise DataError(f"domain {domain.name}: must have tokens to score, got none behind the first. Drop --bos none.")
    return DomainScores(
        name=domain.name,
        note=domain.note,
        losses=DocumentLosses(
            nats=nats,
            num_bytes=np.array([len(one.text.encode()) for one in domain.documents]),
            num_reference_tokens=np.array(num_reference_tokens),
        ),
        num_tokens=num_tokens,
        bad_documents=tuple(
            f"{one.source}:{one.line}"
            for one, value in zip(domain.documents, nats, strict=True)
            if not np.isfinite(value)
        ),
    )


def _sum_losses(
    scorer: Scorer, whole: Sequence[list[int]], max_length: int, stride: int, on_document: Callable[[int], None]
) -> np.ndarray:
    """Nats [d] of sequences that are cut into windows; on_document: called with how many are done."""
    nats = np.zeros(len(whole))
    waiting: list[tuple[int, list[int], int]] = []

    def score_waiting() -> None:
        scores = scorer.score([ids for _, ids, _ in waiting], [count for _, _, count in waiting])
        for (number, _, _), one in zip(waiting, scores, strict=True):
            nats[number] -= one.log_probabilities.sum()
        waiting.clear()

    for number, ids in enumerate(whole):
        waiting += [(number, *window) for window in cut_windows(ids, max_length, stride)]
        if len(waiting) >= WINDOWS_AT_ONCE:
            score_waiting()
            on_document(number + 1)
    if waiting:
        score_waiting()
    on_document(len(whole))
    return nats


def _try_other_prefix(scorer: Scorer, domains: Sequence[Domain], chosen: str, max_length: int) -> Iterator[str]:
    """A note if the first window of some documents is likelier behind the other token: a model that was trained
    without BOS, or only with it, scores badly behind what it has not seen.
    """
    ids = {"BOS": scorer.encoder.bos_id, "EOD": scorer.encoder.eod_id}
    other = "EOD" if chosen == "BOS" else "BOS"
    tried = {name: token for name in (chosen, other) if (token := ids[name]) is not None}
    if len(set(tried.values())) < 2:
        return
    starts = [scorer.encoder.encode(one.text).tolist() for domain in domains for one in domain.documents[:NUM_TRIED]]
    losses = {}
    for name, token in tried.items():
        scores = scorer.score([[token, *text[:max_length]] for text in starts if text])
        losses[name] = -sum(one.log_probabilities.sum() for one in scores)
    if losses[other] < NOTICED_RATIO * losses[chosen]:
        yield (
            f"{scorer.name}: the loss of the first windows is {1 - losses[other] / losses[chosen]:.1%} lower behind "
            f"{other} than behind {chosen}; if the model was trained so, pass --bos {other.lower()}"
        )
