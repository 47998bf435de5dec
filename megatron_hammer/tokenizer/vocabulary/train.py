"""Train a SentencePiece BPE model on any input that the preprocessor reads.

Reproducible: the same text, recipe and seed give the same bytes. The sample depends only on the seed and the order of
the lines. The number of threads, which changes nothing else, is not stored in the model. See recipes.py for the
settings and text_sample.py for the sample.
"""

import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_hammer.corpus.byte_streams import OnBytesRead
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    SENTENCEPIECE_LOGS_ERRORS_ONLY,
    PieceType,
    parse_sentencepiece_model,
    set_trainer_settings,
)
from megatron_hammer.tokenizer.vocabulary.recipes import TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import SourceCounts, TextSource, sample_sources
from megatron_hammer.tokenizer.vocabulary.vocabulary_files import spell_piece

# sentencepiece stores the number in the model; the file must not depend on the machine.
STORED_NUM_THREADS = 1
CONTROL_SYMBOLS = ("<s>", "</s>")  # as user-defined symbols they would begin and end documents where text spells them
# A person does not notice this wait after Ctrl-C.
POLL_INTERVAL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTokenizer:
    """What `train_tokenizer` wrote and from how much text; `sources` has the same counts for each source."""

    path: Path
    vocab_size: int
    num_documents: int
    text_bytes: int
    num_sampled_lines: int
    sampled_bytes: int
    sources: tuple[SourceCounts, ...]


def train_tokenizer(
    sources: Sequence[TextSource],
    output_path: Path,
    recipe: TokenizerRecipe,
    *,
    json_key: str = "text",
    max_bytes: int | None = None,
    seed: int = 1234,
    num_threads: int = 1,
    on_bytes_read: OnBytesRead = lambda num_bytes: None,
    on_training: Callable[[int], None] = lambda sampled_bytes: None,
) -> TrainedTokenizer:
    """Train on a sample of at most `max_bytes` of text (all of it if None) and write the model.

    on_training: told of the sample once it is complete.
    sentencepiece needs about 20 bytes of memory per byte of the sample.
    Raises DataError if the text cannot give `vocab_size` pieces, or if the inputs or the output fail.
    """
    sample, counts = sample_sources(
        sources,
        json_key=json_key,
        max_bytes=max_bytes,
        max_line_bytes=recipe.max_sentence_bytes,
        seed=seed,
        on_bytes_read=on_bytes_read,
    )
    num_documents = sum(count.num_documents for count in counts)
    if not sample:
        raise DataError(f"{counts[0].name}: inputs must hold text, got none in {num_documents} documents. Add some.")
    sampled_bytes = sum(count.sampled_bytes for count in counts)
    on_training(sampled_bytes)
    model_bytes = _train_interruptibly(sample, recipe, num_threads)
    # Before the model gets its name: sentencepiece leaves out what it cannot hold without a word.
    check_requirements(model_bytes, recipe)
    publish_files({output_path: model_bytes})
    return TrainedTokenizer(
        path=output_path,
        vocab_size=recipe.vocab_size,
        num_documents=num_documents,
        text_bytes=sum(count.text_bytes for count in counts),
        num_sampled_lines=len(sample),
        sampled_bytes=sampled_bytes,
        sources=counts,
    )


def check_requirements(model_bytes: bytes, recipe: TokenizerRecipe) -> None:
    """Raise DataError if a required character or a symbol is missing in the model or has another type."""
    types = {piece.text: piece.type for piece in parse_sentencepiece_model(model_bytes).pieces}
    usable = (PieceType.NORMAL, PieceType.USER_DEFINED)
    characters = [character for character in recipe.required_chars if types.get(spell_piece(character)) not in usable]
    symbols = [
        symbol
        for symbol in recipe.user_defined_symbols
        if types.get(spell_piece(symbol)) is not PieceType.USER_DEFINED or symbol in CONTROL_SYMBOLS
    ]
    problems = []
    if characters:
        problems.append(
            f"required-chars-file: every character must become a piece, got none for {_show_first(characters)}. "
            "Remove what sentencepiece cannot hold."
        )
    if symbols:
        problems.append(
            f"user-defined-symbols-file: every symbol must become a piece of its own, got none for "
            f"{_show_first(symbols)}. Remove names that have another role, such as <s>."
        )
    if problems:
        raise DataError(*problems)


def _train_interruptibly(sample: Sequence[bytes], recipe: TokenizerRecipe, num_threads: int) -> bytes:
    """Train in a second thread: sentencepiece does not react to Ctrl-C, but the waiting main thread does."""
    results: list[bytes] = []
    errors: list[BaseException] = []

    def train() -> None:
        try:
            results.append(_train_sentencepiece(sample, recipe, num_threads))
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_INTERVAL_S)
    if errors:
        raise errors[0]
    return results[0]


def _train_sentencepiece(sample: Sequence[bytes], recipe: TokenizerRecipe, num_threads: int) -> bytes:
    """Return the serialised model of exactly `vocab_size` pieces; raises DataError if the text does not give them."""
    model = io.BytesIO()
    symbols = [spell_piece(symbol) for symbol in recipe.user_defined_symbols]
    required = [spell_piece(character) for character in recipe.required_chars]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.decode("utf-8") for line in sample),
            model_writer=model,
            input_format="text",
            model_type="bpe",
            vocab_size=recipe.vocab_size,
            character_coverage=recipe.character_coverage,
            max_sentencepiece_length=recipe.max_piece_chars,
            max_sentence_length=recipe.max_sentence_bytes,
            # A character that is a symbol too is a piece already: sentencepiece fails with "is already defined".
            required_chars="".join(character for character in required if character not in set(symbols)),
            user_defined_symbols=symbols,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name=recipe.normalization_rule,
            add_dummy_prefix=recipe.has_dummy_prefix,
            remove_extra_whitespaces=recipe.removes_extra_whitespaces,
            num_threads=num_threads,
            minloglevel=SENTENCEPIECE_LOGS_ERRORS_ONLY,
        )
    except RuntimeError as error:
        raise _explain_training_error(error, recipe) from error
    return set_trainer_settings(model.getvalue(), num_threads=STORED_NUM_THREADS)


def _explain_training_error(error: RuntimeError, recipe: TokenizerRecipe) -> DataError:
    message = str(error)
    # The messages of sentencepiece's own checks; another version may word them otherwise, then the last line applies.
    if limit := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return DataError(
            f"vocab-size: must not exceed what the text can give, got vocab_size={recipe.vocab_size}, "
            f"pieces found={limit[1]}. Use at most {limit[1]}, or train on more text."
        )
    if needed := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return DataError(
            f"vocab-size: must hold every byte, symbol and character, got vocab_size={recipe.vocab_size}, "
            f"needed={needed[1]}. Raise --vocab-size or lower --character-coverage."
        )
    return DataError(f"tokenizer training: sentencepiece refused the text or the options ({message}). Change them.")


def _show_first(texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text) for text in texts[:5])
    return shown if len(texts) <= 5 else f"{shown} and {len(texts) - 5} more"
