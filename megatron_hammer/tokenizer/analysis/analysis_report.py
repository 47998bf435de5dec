"""An analysis of tokenizers as tables and as one JSON object; analysis_files.py writes CSV and PNG.

Definitions. Bytes per token: UTF-8 bytes of the text / tokens, more is better. Relative to the reference: tokens /
tokens of the reference, less is better. Fertility: all tokens of the documents of a script / their words (Latin:
separated by whitespace) or their characters other than whitespace (Han and the others). Coverage: see coverage.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_hammer.files.tables import build_table
from megatron_hammer.tokenizer.analysis.analyze import Analysis, TokenizerCounts
from megatron_hammer.tokenizer.analysis.script import UNITS, Script


def divide(numerator: float, denominator: float) -> float | None:
    """Return the quotient; None if the denominator is 0, as for a corpus without text."""
    return numerator / denominator if denominator else None


def describe_tokenizer(analysis: Analysis, tokenizer: TokenizerCounts) -> dict[str, Any]:
    """Every figure of one tokenizer, in plain types."""
    described: dict[str, Any] = {
        "name": tokenizer.name,
        "path": str(tokenizer.encoder.path),
        "sha256": tokenizer.encoder.sha256,
        "vocab_size": tokenizer.encoder.vocab_size,
    }
    if tokenizer.coverage:
        described["coverage"] = {
            row.level: {
                "num_characters": row.num_characters,
                "num_covered": row.num_covered,
                "covered_ratio": row.covered_ratio,
            }
            for row in tokenizer.coverage
        }
    if analysis.scripts:
        described["corpus"] = _describe_tokens(analysis, tokenizer, tuple(analysis.scripts))
        described["scripts"] = {
            str(script): _describe_tokens(analysis, tokenizer, (script,))
            | {
                "fertility": divide(tokenizer.num_tokens[script], analysis.scripts[script].num_units),
                "fertility_unit": UNITS[script],
            }
            for script in analysis.scripts
        }
        described["round_trip"] = _describe_round_trip(tokenizer)
    return described


def _describe_tokens(analysis: Analysis, tokenizer: TokenizerCounts, scripts: tuple[Script, ...]) -> dict[str, Any]:
    # By name: the reference need not be the first tokenizer.
    reference = next(other for other in analysis.tokenizers if other.name == analysis.reference)
    num_tokens = sum(tokenizer.num_tokens[script] for script in scripts)
    return {
        "num_tokens": num_tokens,
        "bytes_per_token": divide(sum(analysis.scripts[script].text_bytes for script in scripts), num_tokens),
        "tokens_ratio": divide(num_tokens, sum(reference.num_tokens[script] for script in scripts)),
    }


def _describe_round_trip(tokenizer: TokenizerCounts) -> dict[str, Any]:
    return {
        "num_documents": tokenizer.round_trip.num_documents,
        "num_changed_documents": tokenizer.round_trip.num_changed_documents,
        "losses": {str(kind): dataclasses.asdict(loss) for kind, loss in tokenizer.round_trip.classes.items()},
    }


def describe_analysis(analysis: Analysis) -> dict[str, Any]:
    """The whole analysis in plain types, for --json."""
    return {
        "num_documents": analysis.num_documents,
        "text_bytes": analysis.text_bytes,
        "scripts": {
            str(script): dataclasses.asdict(counts) | {"unit": UNITS[script]}
            for script, counts in analysis.scripts.items()
        },
        "reference": analysis.reference,
        "tokenizers": [describe_tokenizer(analysis, tokenizer) for tokenizer in analysis.tokenizers],
    }


def print_analysis(analysis: Analysis, console: Console) -> None:
    described = [describe_tokenizer(analysis, tokenizer) for tokenizer in analysis.tokenizers]
    for table in _build_tables(analysis, described):
        console.print(table)
        console.print()


def _build_tables(analysis: Analysis, described: list[dict[str, Any]]) -> Iterator[Table]:
    if analysis.tokenizers[0].coverage:
        yield _build_coverage(analysis)
    if analysis.scripts:
        yield _build_tokens(analysis, described)
        for script in analysis.scripts:
            yield _build_script(analysis, described, script)
        yield _build_losses(described)


def _build_coverage(analysis: Analysis) -> Table:
    names = [tokenizer.name for tokenizer in analysis.tokenizers]
    levels = zip(*(tokenizer.coverage for tokenizer in analysis.tokenizers), strict=True)
    rows = (
        (level[0].level, f"{level[0].num_characters:,}", *(f"{100 * row.covered_ratio:.2f}" for row in level))
        for level in levels
    )
    return build_table("Coverage: characters with a token of their own, %", ("level", "characters", *names), rows)


def _build_tokens(analysis: Analysis, described: list[dict[str, Any]]) -> Table:
    title = f"Corpus: {analysis.num_documents:,} documents, {analysis.text_bytes / 1e6:,.2f} MB"
    columns = ("tokenizer", "vocabulary", "tokens", "bytes a token", f"tokens / {analysis.reference}", "changed")
    rows = (
        (
            row["name"],
            f"{row['vocab_size']:,}",
            *_token_cells(row["corpus"]),
            f"{row['round_trip']['num_changed_documents']:,}",
        )
        for row in described
    )
    return build_table(title, columns, rows)


def _build_script(analysis: Analysis, described: list[dict[str, Any]], script: Script) -> Table:
    counts = analysis.scripts[script]
    title = f"{script}: {counts.num_documents:,} documents, {counts.text_bytes / 1e6:,.2f} MB"
    fertility = f"tokens a {UNITS[script]}"
    columns = ("tokenizer", "tokens", "bytes a token", f"tokens / {analysis.reference}", fertility)
    rows = []
    for row in described:
        figures = row["scripts"][str(script)]
        rows.append((row["name"], *_token_cells(figures), _format(figures["fertility"])))
    return build_table(title, columns, rows)


def _token_cells(figures: dict[str, Any]) -> tuple[str, str, str]:
    return f"{figures['num_tokens']:,}", _format(figures["bytes_per_token"]), _format(figures["tokens_ratio"])


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _build_losses(described: list[dict[str, Any]]) -> Table:
    columns = ("tokenizer", "loss", "first at", "text", "comes back as", "places", "documents")
    rows = []
    for row in described:
        # A row for a tokenizer without losses too, or it would look as if it had been left out.
        if not row["round_trip"]["losses"]:
            rows.append((row["name"], "none", "", "", "", "0", "0"))
        for kind, loss in row["round_trip"]["losses"].items():
            texts = (loss[name] for name in ("where", "before", "after"))
            rows.append((row["name"], kind, *texts, f"{loss['num_places']:,}", f"{loss['num_documents']:,}"))
    return build_table("Round trip: decode(encode(text)) against text", columns, rows, num_text=5)


def summarise_analysis(analysis: Analysis, elapsed_s: float) -> str:
    """One line: what was read, and which tokenizers give the text back."""
    parts = [f"{len(analysis.tokenizers)} tokenizers"]
    if analysis.scripts:
        parts.append(f"{analysis.num_documents:,} documents, {analysis.text_bytes / 1e6:,.2f} MB")
        changed = ", ".join(
            f"{tokenizer.name} {tokenizer.round_trip.num_changed_documents:,}" for tokenizer in analysis.tokenizers
        )
        parts.append(f"documents changed by a round trip: {changed}")
    return f"{'; '.join(parts)}; {elapsed_s:.1f} s"
