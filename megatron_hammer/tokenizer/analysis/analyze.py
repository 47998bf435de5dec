"""Tokenizers side by side on one corpus: how many tokens they need, and whether their text comes back.

One pass over the documents serves every tokenizer, in batches, with memory for one batch; only a sample is held whole.
What is counted is exact integers; every ratio is derived from them in analysis_report.py.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_hammer.corpus.readers import Document, batch_documents
from megatron_hammer.errors import ConfigError
from megatron_hammer.tokenizer.analysis.round_trip import RoundTripCounts
from megatron_hammer.tokenizer.analysis.script import Script, count_units, detect_script
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from megatron_hammer.tokenizer.vocabulary.coverage import LevelCoverage, measure_coverage
from megatron_hammer.tokenizer.vocabulary.text_sample import sample_within


@dataclass(slots=True)
class ScriptCounts:
    """The documents of one script. num_units: words for Latin, else characters that are not whitespace."""

    num_documents: int = 0
    text_bytes: int = 0
    num_units: int = 0


@dataclass(slots=True)
class TokenizerCounts:
    """One tokenizer on the corpus. num_tokens: by the script of the document, without any bos or eod."""

    name: str
    encoder: Encoder
    num_tokens: Counter[Script] = field(default_factory=Counter)
    round_trip: RoundTripCounts = field(default_factory=RoundTripCounts)
    coverage: tuple[LevelCoverage, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What was counted; `scripts` is empty where no corpus was given. reference: the name that ratios refer to."""

    scripts: Mapping[Script, ScriptCounts]
    tokenizers: Sequence[TokenizerCounts]
    reference: str

    @property
    def num_documents(self) -> int:
        return sum(counts.num_documents for counts in self.scripts.values())

    @property
    def text_bytes(self) -> int:
        return sum(counts.text_bytes for counts in self.scripts.values())


def parse_named_tokenizer(text: str) -> tuple[str, Path]:
    """`NAME=PATH` as its two parts; a PATH alone is named after its file without the suffix, or after its folder."""
    name, separator, path = text.partition("=")
    if not separator or "/" in name:
        # Files of these names lie in a folder that is named after the model.
        is_generic = Path(text).name in ("tokenizer.json", "tokenizer.model")
        name, path = Path(text).parent.name if is_generic else Path(text).stem, text
    if not (name and path):
        raise ConfigError(f"--tokenizers: each must be NAME=PATH, got {text!r}. Use --tokenizers mine=my.model ...")
    return name, Path(path)


def load_named_tokenizers(named_paths: Sequence[tuple[str, Path]], reference: str | None) -> dict[str, Encoder]:
    """Load every tokenizer; raises ConfigError for names that are not distinct and for an unknown reference."""
    names = [name for name, _ in named_paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"--tokenizers: names must differ, got {', '.join(names)}. Write NAME=PATH to rename one.")
    if reference is not None and reference not in names:
        raise ConfigError(f"--reference: must be one of {', '.join(names)}, got {reference}. Name a tokenizer.")
    return {name: load_encoder(path) for name, path in named_paths}


def sample_documents(documents: Iterable[Document], *, max_bytes: int, seed: int) -> list[Document]:
    """Return a uniform random sample of whole documents; see `sample_within`."""
    return sample_within(documents, lambda document: len(document.text.encode("utf-8")), max_bytes=max_bytes, seed=seed)


def analyze_tokenizers(
    encoders: Mapping[str, Encoder],
    documents: Iterable[Document] = (),
    *,
    levels: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
) -> Analysis:
    """Count tokens, coverage of `levels` and losses of every tokenizer; the reference is the first one unless named."""
    tokenizers = [TokenizerCounts(name=name, encoder=encoder) for name, encoder in encoders.items()]
    for tokenizer in tokenizers:
        tokenizer.coverage = measure_coverage(tokenizer.encoder, levels or {})
    scripts: dict[Script, ScriptCounts] = {}
    for batch in batch_documents(documents):
        batch_scripts = [detect_script(document.text) for document in batch]
        for document, script in zip(batch, batch_scripts, strict=True):
            counts = scripts.setdefault(script, ScriptCounts())
            counts.num_documents += 1
            counts.text_bytes += len(document.text.encode("utf-8"))
            counts.num_units += count_units(document.text, script)
        for tokenizer in tokenizers:
            _count_batch(tokenizer, batch, batch_scripts)
    return Analysis(
        # In the order of the enumeration, not in that in which they were met.
        scripts={script: scripts[script] for script in Script if script in scripts},
        tokenizers=tokenizers,
        reference=reference or tokenizers[0].name,
    )


def _count_batch(tokenizer: TokenizerCounts, batch: list[Document], scripts: list[Script]) -> None:
    ids, lengths = tokenizer.encoder.encode_batch([document.text for document in batch])
    # Without the last sum: it is the end, behind which there would be an empty part.
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for document, script, part in zip(batch, scripts, parts, strict=True):
        tokenizer.num_tokens[script] += len(part)
        # Decoded from the same ids: encoding twice would double the time.
        tokenizer.round_trip.add(document, tokenizer.encoder.decode(part))
