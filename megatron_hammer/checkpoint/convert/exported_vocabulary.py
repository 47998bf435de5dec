"""How many rows of the embedding are tokens, and how many Megatron added to pad them for tensor parallelism.

This package saves the number of tokens. Megatron-LM's own loop saves it only where --vocab-size was passed, so there it
is the tokenizer's, or nobody's. Whatever is judged here is said in a note of the export.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyChoice:
    """num_tokens: None where nothing says it. reason: where the number comes from; "" where it was saved as such."""

    num_tokens: int | None
    reason: str = ""

    def describe(self, num_rows: int) -> Iterator[str]:
        """A note on the rows beyond the tokens, or on rows that may be padding. num_rows: stored."""
        if self.num_tokens is None:
            yield (
                f"all {num_rows:,} rows of the embedding are exported as tokens, though some may be padding: the "
                "checkpoint has neither vocab_size nor a tokenizer; pass --vocab-size or --tokenizer-model"
            )
        elif self.reason and num_rows > self.num_tokens:
            yield (
                f"rows {self.num_tokens:,} to {num_rows - 1:,} of the embedding were judged padding and left out: "
                f"{self.reason}; if they are tokens, pass --vocab-size {num_rows}"
            )


def select_vocabulary(args: Any, *, asked: int | None, tokenizer_path: Path | None) -> VocabularyChoice:
    """The number of tokens of a checkpoint with these arguments; asked: what the user says, which is taken as it is.

    Raises HammerError if the tokenizer is needed and cannot be read.
    """
    saved = getattr(args, "vocab_size", None)
    # Both names are this package's. Its runs and its conversions save the number of tokens, whatever the tokenizer.
    is_ours = hasattr(args, "embedding_norm") or hasattr(args, "imported_from")
    if asked is not None or (is_ours and saved is not None):
        return VocabularyChoice(num_tokens=asked or saved)
    if tokenizer_path is not None:
        from megatron_hammer.tokenizer.encoding.encoder import load_encoder

        num_ids = load_encoder(tokenizer_path).vocab_size
        if saved is None or saved <= num_ids:
            return VocabularyChoice(num_tokens=num_ids, reason=f"{tokenizer_path} has {num_ids:,} ids")
    if saved is None:
        return VocabularyChoice(num_tokens=None)
    # Until core 0.17, which has no null_tokenizer_eod_id, the NullTokenizer added its end of document to the number.
    is_null = getattr(args, "tokenizer_type", None) == "NullTokenizer"
    if is_null and not hasattr(args, "null_tokenizer_eod_id"):
        return VocabularyChoice(
            num_tokens=saved + 1, reason=f"vocab_size={saved}, to which the NullTokenizer adds its end of document"
        )
    return VocabularyChoice(num_tokens=saved, reason=f"the checkpoint's vocab_size is {saved:,}")
