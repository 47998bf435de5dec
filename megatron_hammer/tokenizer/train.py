"""Train a SentencePiece BPE model with HammerLLM's parameters, on any input that the preprocessor reads.

Reproducible: the same text, options and seed give the same bytes. Two things make it so: one training thread (the
number is stored in the model), and a sample that depends on nothing but the seed and the order of the lines.
"""

import heapq
import io
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_hammer.data.atomic_files import open_atomically
from megatron_hammer.data.readers import decode_record, find_input_files, read_records
from megatron_hammer.errors import DataError

# sentencepiece drops longer sentences without a word, so we cut them; the value is that of HammerLLM's own 128k model.
MAX_SENTENCE_BYTES = 8384
SENTENCEPIECE_LOGS_ERRORS_ONLY = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecipe:
    """What shapes the vocabulary. The defaults are HammerLLM's.

    Source: trainer_spec stored in HammerLLM's 128k model (coverage, lengths, digits, whitespace) and normalizer_spec of
    its published model (identity, no dummy prefix, whitespace kept).
    """

    vocab_size: int = 128_000
    character_coverage: float = 0.9995
    max_piece_chars: int = 32
    required_chars: str = ""
    user_defined_symbols: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTokenizer:
    """What `train_tokenizer` wrote and from how much text."""

    path: Path
    vocab_size: int
    num_documents: int
    text_bytes: int
    num_sampled_lines: int
    sampled_bytes: int


def train_tokenizer(
    inputs: Sequence[str | Path],
    output_path: Path,
    recipe: TokenizerRecipe,
    *,
    json_key: str = "text",
    max_bytes: int | None = None,
    seed: int = 1234,
    on_bytes_read: Callable[[int], None] = lambda num_bytes: None,
) -> TrainedTokenizer:
    """Train on a sample of at most `max_bytes` of text (all of it if None) and write the model.

    Raises DataError if the text cannot give `vocab_size` pieces, or if the inputs or the output fail.
    """
    text_source = _TextLines(inputs, json_key, on_bytes_read)
    sample = sample_lines(text_source, max_bytes=max_bytes, seed=seed)
    if not sample:
        raise DataError(
            f"{inputs[0]}: inputs must hold text, got none in {text_source.num_documents} documents. Add some."
        )
    model_bytes = _train_sentencepiece(sample, recipe)
    with open_atomically(output_path) as file:
        file.write(model_bytes)
    return TrainedTokenizer(
        path=output_path,
        vocab_size=recipe.vocab_size,
        num_documents=text_source.num_documents,
        text_bytes=text_source.text_bytes,
        num_sampled_lines=len(sample),
        sampled_bytes=sum(len(line) for line in sample),
    )


class _TextLines:
    """The lines of all documents as UTF-8, cut at MAX_SENTENCE_BYTES; counts what it has passed on."""

    def __init__(self, inputs: Sequence[str | Path], json_key: str, on_bytes_read: Callable[[int], None]):
        self._files = find_input_files(inputs).files
        self._json_key = json_key
        self._on_bytes_read = on_bytes_read
        self.num_documents = 0
        self.text_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for record in read_records(self._files, (self._json_key,), self._on_bytes_read):
            (text,) = decode_record(record, (self._json_key,))
            encoded = text.encode("utf-8")
            self.num_documents += 1
            self.text_bytes += len(encoded)
            for line in encoded.split(b"\n"):
                if line.strip():
                    yield from cut_line(line, MAX_SENTENCE_BYTES)


def cut_line(line: bytes, max_bytes: int) -> Iterator[bytes]:
    """Yield the line in pieces of at most `max_bytes`, cut at a space where there is one, never inside a character."""
    start = 0
    while len(line) - start > max_bytes:
        end = line.rfind(b" ", start + 1, start + max_bytes)
        if end < 0:
            end = start + max_bytes
            while line[end] & 0xC0 == 0x80:  # a continuation byte of UTF-8
                end -= 1
        yield line[start:end]
        start = end
    yield line[start:]


def sample_lines(lines: Iterable[bytes], *, max_bytes: int | None, seed: int) -> list[bytes]:
    """Return a uniform random sample of whole lines of at most `max_bytes` together, in their original order.

    One pass and memory for the sample only: each line draws a random number and those with the smallest stay.
    """
    if max_bytes is None:
        return list(lines)
    draw = random.Random(seed).random
    kept: list[tuple[float, int, bytes]] = []  # a heap whose first entry has the largest draw, as -draw
    kept_bytes = 0
    for position, line in enumerate(lines):
        heapq.heappush(kept, (-draw(), position, line))
        kept_bytes += len(line)
        while kept_bytes > max_bytes:
            kept_bytes -= len(heapq.heappop(kept)[2])
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _train_sentencepiece(sample: Sequence[bytes], recipe: TokenizerRecipe) -> bytes:
    """Return the serialised model of exactly `vocab_size` pieces; raises DataError if the text does not give them."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.decode("utf-8") for line in sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=recipe.vocab_size,
            character_coverage=recipe.character_coverage,
            max_sentencepiece_length=recipe.max_piece_chars,
            max_sentence_length=MAX_SENTENCE_BYTES,
            required_chars=recipe.required_chars,
            user_defined_symbols=list(recipe.user_defined_symbols),
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=SENTENCEPIECE_LOGS_ERRORS_ONLY,
        )
    except RuntimeError as error:
        raise _explain_training_error(error, recipe) from error
    return model.getvalue()


def _explain_training_error(error: RuntimeError, recipe: TokenizerRecipe) -> DataError:
    message = str(error)
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


def read_required_chars(path: Path) -> str:
    """Return the distinct characters of a UTF-8 file, in order, without line ends."""
    return "".join(dict.fromkeys(_read_text(path).replace("\n", "").replace("\r", "")))


def read_user_defined_symbols(path: Path) -> tuple[str, ...]:
    """Return the distinct non-empty lines of a UTF-8 file, taken literally: `\\343` is four characters."""
    return tuple(dict.fromkeys(line for line in _read_text(path).splitlines() if line))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: file cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise DataError(f"{path}: text must be UTF-8, got {where}. Convert the file with iconv.") from error
