"""The report on an inspected pair, as tables or as a dictionary for JSON."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.table import Table

from megatron_hammer.data.indexed.manifest import Manifest
from megatron_hammer.data.inspect.document_text import DocumentText
from megatron_hammer.data.inspect.length_histogram import LengthHistogram, build_histogram
from megatron_hammer.data.inspect.statistics import PairStatistics, count_common_documents, summarise_lengths
from megatron_hammer.data.inspect.verify_pair import VerifiedPair
from megatron_hammer.files.tables import build_pairs, build_table, open_console

SAMPLE_CHARACTERS = 300
BAR_CHARACTERS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequentToken:
    """text: what the id decodes to, or None without a tokenizer."""

    token_id: int
    count: int
    text: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonDocuments:
    """Of the documents of one pair, those that another one holds too, as when validation data leaked into training."""

    prefix: str
    other_prefix: str
    num_documents: int
    num_common: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairReport:
    """Everything that was found about one pair; verified: None where that was not asked for."""

    prefix: str
    statistics: PairStatistics
    vocab_size: int | None
    manifest: Manifest | None
    verified: VerifiedPair | None
    frequent_tokens: Sequence[FrequentToken]
    samples: Sequence[DocumentText]


def find_common_documents(reports: Sequence[PairReport]) -> list[CommonDocuments]:
    """Compare every pair with every other one whose ids have the same type, in both directions."""
    return [
        CommonDocuments(
            prefix=report.prefix,
            other_prefix=other.prefix,
            num_documents=report.statistics.index.num_documents,
            num_common=count_common_documents(report.statistics, other.statistics),
        )
        # In both directions: the share differs, because the two pairs have different numbers of documents.
        for report, other in itertools.permutations(reports, 2)
        # Digests are of the stored bytes, which differ between types for the same ids.
        if report.statistics.index.dtype == other.statistics.index.dtype
    ]


def print_common_documents(rows: Sequence[CommonDocuments], stream: IO[str]) -> None:
    """Print one line per pair of data sets; nothing if there is only one data set."""
    if not rows:
        return
    cells = (
        (row.prefix, row.other_prefix, f"{row.num_common:,}", _share(row.num_common, row.num_documents)) for row in rows
    )
    columns = ("of", "in", "documents", "share")
    table = build_table("documents that another pair holds too", columns, cells, num_text=2)
    open_console(stream).print(table, "")


def report_to_json(report: PairReport) -> dict[str, Any]:
    """Return the report as plain values; lengths are null without documents, manifest without one."""
    statistics, index = report.statistics, report.statistics.index
    lengths = summarise_lengths(statistics.lengths)
    histogram = build_histogram(statistics.lengths)
    return {
        "prefix": report.prefix,
        "dtype": index.dtype.name,
        "num_documents": index.num_documents,
        "num_empty_documents": statistics.num_empty_documents,
        "num_sequences": index.num_sequences,
        "num_tokens": index.num_tokens,
        "document_tokens": dataclasses.asdict(lengths) if lengths is not None else None,
        "length_histogram": [
            {"min_tokens": low, "max_tokens": high - 1, "num_documents": documents, "num_tokens": tokens}
            for low, high, documents, tokens in _list_bins(histogram)
        ],
        "duplicates": dataclasses.asdict(statistics.duplicates),
        "vocab_size": report.vocab_size,
        "num_unused_ids": statistics.num_unused_ids,
        "frequent_tokens": [dataclasses.asdict(token) for token in report.frequent_tokens],
        "samples": [dataclasses.asdict(sample) for sample in report.samples],
        "is_verified": report.verified is not None,
        "manifest": report.manifest.to_json() if report.manifest is not None else None,
    }


def print_pair_report(report: PairReport, stream: IO[str]) -> None:
    """Print the report as tables; the samples come last, cut to a few hundred characters."""
    console = open_console(stream)
    console.print(_build_counts(report), "")
    if report.manifest is not None:
        console.print(_build_manifest(report.manifest), "")
    if report.statistics.index.num_documents:
        console.print(_build_lengths(build_histogram(report.statistics.lengths)), "")
    if report.frequent_tokens:
        console.print(_build_tokens(report), "")
    for sample in report.samples:
        cut = "..." if len(sample.text) > SAMPLE_CHARACTERS else ""
        console.print(f"document {sample.number:,}, {sample.num_tokens:,} tokens:")
        # A document is text of its own width: rich must not break its lines.
        console.print(sample.text[:SAMPLE_CHARACTERS] + cut + "\n", soft_wrap=True)


def _build_counts(report: PairReport) -> Table:
    statistics, index, duplicates = report.statistics, report.statistics.index, report.statistics.duplicates
    num_texts = index.num_documents - statistics.num_empty_documents
    vocabulary = "of the vocabulary" if report.vocab_size is not None else "up to the largest that occurs"
    rows = {
        "documents": f"{index.num_documents:,}",
        "empty documents": f"{statistics.num_empty_documents:,}",
        "sequences": f"{index.num_sequences:,}",
        "tokens": f"{index.num_tokens:,} as {index.dtype.name}",
    }
    lengths = summarise_lengths(statistics.lengths)
    if lengths is not None:
        rows["tokens of a document"] = (
            f"min {lengths.minimum:,}, median {lengths.median:,}, mean {lengths.mean:,.1f}, p90 {lengths.p90:,}, "
            f"p99 {lengths.p99:,}, max {lengths.maximum:,}"
        )
    rows["duplicate documents"] = (
        f"{duplicates.num_duplicates:,} ({_share(duplicates.num_duplicates, num_texts)}) with "
        f"{duplicates.num_duplicate_tokens:,} tokens ({_share(duplicates.num_duplicate_tokens, index.num_tokens)}); "
        f"{duplicates.num_texts_repeated:,} texts repeat, the most {duplicates.most_copies:,} times"
    )
    num_ids = len(statistics.token_counts)
    rows["ids that never occur"] = (
        f"{statistics.num_unused_ids:,} of {num_ids:,} {vocabulary} ({_share(statistics.num_unused_ids, num_ids)})"
    )
    if report.verified is not None:
        hashes = "hashes agree with the manifest" if report.verified.has_hashes else "no hashes to compare with"
        rows["integrity"] = f"every byte read, no problem found; {hashes}"
    return build_pairs(report.prefix, rows)


def _build_manifest(manifest: Manifest) -> Table:
    options = ", ".join(f"{name}={value}" for name, value in manifest.options.items() if value not in (None, False))
    sources = ", ".join(source.path for source in manifest.sources[:3])
    more = f" and {len(manifest.sources) - 3:,} more" if len(manifest.sources) > 3 else ""
    tokenizer = manifest.tokenizer
    rows = {
        "made from": f"{sources}{more}",
        "tokenizer": f"{tokenizer.name} ({tokenizer.vocab_size:,} ids, SHA-256 {tokenizer.sha256[:12]}...)",
        "options": options,
        "text": f"{manifest.text_bytes:,} bytes, {manifest.bytes_per_token:.3f} bytes a token",
        "dropped records": f"{manifest.num_dropped_documents:,}",
    }
    return build_pairs("manifest", rows)


def _build_lengths(histogram: LengthHistogram) -> Table:
    rows = []
    total_tokens = int(histogram.num_tokens.sum())
    most_documents = int(histogram.num_documents.max(initial=1))
    for low, high, documents, tokens in _list_bins(histogram):
        lengths = f"{low:,}" if high == low + 1 else f"{low:,} - {high - 1:,}"
        # Rounded up: a bin with one document must show a bar too.
        bar = "#" * -(-documents * BAR_CHARACTERS // max(most_documents, 1))
        rows.append((lengths, f"{documents:,}", f"{tokens:,}", _share(tokens, total_tokens), bar))
    table = build_table("documents by length", ("tokens", "documents", "tokens in all", "share", ""), rows, num_text=0)
    table.columns[-1].justify = "left"  # the bars
    return table


def _list_bins(histogram: LengthHistogram) -> list[tuple[int, int, int, int]]:
    """Lower and upper edge, documents and tokens of every bin from the first that is not empty."""
    columns = (histogram.edges[:-1], histogram.edges[1:], histogram.num_documents, histogram.num_tokens)
    bins = list(zip(*(column.tolist() for column in columns), strict=True))
    # The bins before the shortest document are all empty, and say nothing.
    first = next((k for k, (_, _, documents, _) in enumerate(bins) if documents), len(bins))
    return bins[first:]


def _build_tokens(report: PairReport) -> Table:
    num_tokens = report.statistics.index.num_tokens
    rows = [
        (str(token.token_id), f"{token.count:,}", _share(token.count, num_tokens)) for token in report.frequent_tokens
    ]
    texts = [token.text for token in report.frequent_tokens]
    if all(text is None for text in texts):
        return build_table("most frequent tokens", ("id", "count", "share"), rows, num_text=0)
    rows_with_text = [(*row, text or "") for row, text in zip(rows, texts, strict=True)]
    table = build_table("most frequent tokens", ("id", "count", "share", "text"), rows_with_text, num_text=0)
    # texts, unlike the numbers before them
    table.columns[-1].justify = "left"
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0.00%"
