"""What a quantization costs: bytes, perplexity and bits per byte by domain, and how often the likeliest token changes.

A folder in GPTQ or AWQ format is computed from the weights that its packed layers stand for (packed_weights.py), so
that no kernel is needed. Other folders and GGUF files are computed as they are.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.checkpoint.gguf.llama_cpp import open_llama_cpp
from megatron_hammer.checkpoint.hugging_face.config_json import CONFIG_NAME, read_config
from megatron_hammer.checkpoint_files.safetensors.weight_files import open_hf_weights
from megatron_hammer.data.preprocess.worker_pool import count_cores
from megatron_hammer.errors import ConfigError
from megatron_hammer.evaluation.perplexity.domains import Domain
from megatron_hammer.evaluation.perplexity.formula import DomainEstimates, estimate_domain
from megatron_hammer.evaluation.perplexity.measure import (
    MeasureOptions,
    ModelScores,
    ReferenceTokenizer,
    choose_prefix,
    measure_model,
)
from megatron_hammer.evaluation.scorers.open_scorer import ScorerOptions, use_scorer
from megatron_hammer.evaluation.scorers.scorer import Scorer
from megatron_hammer.files.tables import format_markdown_table
from megatron_hammer.files.typed import replace_non_finite
from megatron_hammer.serving.quantization.packed_weights import write_plain_folder
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder

PLACES_PER_DOMAIN = 256
MOST_CONTEXT_TOKENS = 256
SEED = 1234
SPEED_TOKENS, SPEED_ROUNDS, MOST_THREADS = 32, 5, 8
COLUMNS = (
    *("model", "domain", "bytes", "of the source", "perplexity", "bits per byte", "change", "same token"),
    "speed of GGUF",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedDomain:
    """agreement: share of `num_places` places of the text where this model's likeliest next token is the source's."""

    name: str
    estimates: DomainEstimates
    agreement: float
    num_places: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedModel:
    """size_bytes: of the weights, or of a GGUF file. notes: what the measurement noticed.

    speed: of a GGUF file, generated tokens per second in units of the first GGUF file; None for others, which are not
    computed here as a server computes them, and where there is no second file.
    """

    name: str
    size_bytes: int
    domains: tuple[ComparedDomain, ...]
    notes: tuple[str, ...]
    speed: float | None = None


def compare_models(
    paths: Sequence[Path],
    domains: Sequence[Domain],
    *,
    options: ScorerOptions,
    bos: str = "auto",
    on_model: Callable[[str, int, int | None], None] = lambda *_: None,
) -> list[ComparedModel]:
    """Measure every model; the first one is the source, with which the others are compared. bos: as in MeasureOptions.

    Raises ConfigError for a model with another tokenizer than the source's: its ids mean other texts.
    """
    encoder = load_encoder(paths[0])
    reference = ReferenceTokenizer(encoder)
    places: list[list[list[int]]] = []

    def measure(scorer: Scorer) -> tuple[ModelScores, list[list[int]]]:
        require_same_ids(scorer, encoder, domains)
        if not places:  # of the source's length, for all models
            places.extend(draw_places(encoder, domain, scorer.max_length, bos=bos) for domain in domains)
        scores = measure_model(scorer, domains, MeasureOptions(bos=bos), reference=reference)
        return scores, [scorer.choose_next(ids) for ids in places]

    # Models of one name are called by their paths, as in every table of models.
    names = [path.absolute().name for path in paths]
    compared: list[ComparedModel] = []
    chosen_by_source: list[list[int]] = []
    for number, path in enumerate(paths):
        on_model("comparison", number, len(paths))
        with open_computable(path) as computable:
            result = use_scorer(computable, options, measure)
        assert result is not None  # only other ranks of a checkpoint of Megatron get None
        scores, chosen = result
        chosen_by_source = chosen_by_source or chosen
        rows = zip(scores.domains, chosen, chosen_by_source, strict=True)
        compared.append(
            ComparedModel(
                name=names[number] if names.count(names[number]) == 1 else str(path),
                size_bytes=open_hf_weights(path).num_bytes if path.is_dir() else path.stat().st_size,
                domains=tuple(
                    ComparedDomain(
                        name=domain.name,
                        estimates=estimate_domain(domain.losses),
                        agreement=float(np.mean(np.array(ours) == np.array(source))),
                        num_places=len(ours),
                    )
                    for domain, ours, source in rows
                ),
                notes=scores.notes,
            )
        )
    speeds = measure_speeds([path for path in paths if path.suffix == ".gguf"], places[0][-1] if places else [])
    on_model("comparison", len(paths), len(paths))
    return [replace(model, speed=speeds.get(path)) for model, path in zip(compared, paths, strict=True)]


def measure_speeds(paths: Sequence[Path], prompt: Sequence[int]) -> dict[Path, float]:
    """Generated tokens per second of GGUF files in units of the first one, by the fastest of some rounds in turn."""
    if len(paths) < 2:
        return {}
    times_ms: dict[Path, list[float]] = {path: [] for path in paths}
    num_threads = min(count_cores(), MOST_THREADS)
    with ExitStack() as stack:
        models = {
            path: stack.enter_context(
                open_llama_cpp(path, num_context_tokens=len(prompt) + SPEED_TOKENS, num_threads=num_threads)
            )
            for path in paths
        }
        for _ in range(SPEED_ROUNDS):
            for path, model in models.items():
                answer = model.continue_text(prompt, num_tokens=SPEED_TOKENS)
                times_ms[path].append(answer["timings"]["predicted_ms"])
    return {path: min(times_ms[paths[0]]) / min(times) for path, times in times_ms.items()}


@contextmanager
def open_computable(path: Path) -> Iterator[Path]:
    """The path itself, or for GPTQ and AWQ a folder of plain weights beside it until the end of the block."""
    config = path / CONFIG_NAME
    if not config.is_file() or "quantization_config" not in read_config(config):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=f"{path.name}-plain-", dir=path.absolute().parent) as folder:
        write_plain_folder(path, Path(folder))
        yield Path(folder)


def require_same_ids(scorer: Scorer, encoder: Encoder, domains: Sequence[Domain]) -> None:
    """Raise ConfigError if the model's tokenizer encodes the first document of a domain in another way."""
    for domain in domains:
        text = domain.documents[0].text
        if scorer.encoder.encode(text).tolist() != encoder.encode(text).tolist():
            raise ConfigError(
                f"compare: models must have the tokenizer of {encoder.path}, got another one in {scorer.encoder.path}. "
                "Use tools/evaluate_perplexity.py, which compares models of different tokenizers."
            )


def draw_places(encoder: Encoder, domain: Domain, max_length: int, *, bos: str = "auto") -> list[list[int]]:
    """The tokens before places that are drawn evenly from a domain's documents, the same ones for every model."""
    generator = np.random.default_rng(SEED)
    _, prefix = choose_prefix(encoder, bos)
    start = [] if prefix is None else [prefix]
    encoded = [start + encoder.encode(document.text).tolist() for document in domain.documents]
    # A place is a token that has another one before it; `ends`: how many places there are up to each document's end.
    ends = np.cumsum([max(0, len(ids) - 1) for ids in encoded])
    drawn = generator.choice(ends[-1], size=min(PLACES_PER_DOMAIN, ends[-1]), replace=False)
    most = min(max_length, MOST_CONTEXT_TOKENS)
    places = []
    for place in np.sort(drawn).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        length = place - (int(ends[number - 1]) if number else 0) + 1
        places.append(encoded[number][max(0, length - most) : length])
    return places


def build_rows(models: Sequence[ComparedModel]) -> list[tuple[str, ...]]:
    """One row per model and domain, in the columns of COLUMNS. Perplexity has its interval of 95 %."""
    source = models[0]
    rows: list[tuple[str, ...]] = []
    for model in models:
        for domain, before in zip(model.domains, source.domains, strict=True):
            perplexity, bits = domain.estimates.perplexity, domain.estimates.bits_per_byte
            # The standard error of a share.
            error = math.sqrt(domain.agreement * (1 - domain.agreement) / domain.num_places)
            rows.append(
                (
                    model.name,
                    domain.name,
                    f"{model.size_bytes:,}",
                    f"{model.size_bytes / source.size_bytes:.1%}",
                    f"{perplexity.value:.2f} [{perplexity.low:.2f}, {perplexity.high:.2f}]",
                    f"{bits.value:.4f}",
                    f"{bits.value - before.estimates.bits_per_byte.value:+.4f}",
                    f"{domain.agreement:.1%} ± {error:.1%}",
                    "-" if model.speed is None else f"{model.speed:.2f}",
                )
            )
    return rows


def describe(models: Sequence[ComparedModel]) -> list[dict[str, Any]]:
    """The same as an object per model and domain; figures that are not finite are null."""
    return [
        replace_non_finite(
            {
                "model": model.name,
                "size_bytes": model.size_bytes,
                "speed_of_gguf": model.speed,
                "domain": domain.name,
                "perplexity": domain.estimates.perplexity.value,
                "perplexity_low": domain.estimates.perplexity.low,
                "perplexity_high": domain.estimates.perplexity.high,
                "bits_per_byte": domain.estimates.bits_per_byte.value,
                "agreement": domain.agreement,
                "num_places": domain.num_places,
            }
        )
        for model in models
        for domain in model.domains
    ]


def format_markdown(models: Sequence[ComparedModel]) -> str:
    """The rows as a table for README files."""
    return format_markdown_table(COLUMNS, build_rows(models), num_text=2)
