"""Split text into sentences with nltk's Punkt, as Megatron-LM's tool does. No download, no pickle."""

import hashlib
from collections.abc import Callable
from typing import Any

from megatron_hammer.errors import DataError, PlatformError

# Megatron-LM's tool splits longer texts piece by piece, so a cut in the middle of a sentence is part of its output.
PIECE_CHARS = 1_000_000
MODEL_FOLDER = "tokenizers/punkt_tab"
MODEL_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
# Like nltk's own, except that the space behind a sentence belongs to it and is not dropped. Anchored where a run
# of characters starts: it finds the same matches there as everywhere, in time that is linear in the length of the run.
KEEP_SPACE_PATTERN = r"(?<!\S)\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"


def load_sentence_splitter(language: str, *, keep_newlines: bool) -> Callable[[str], list[str]]:
    """Return a function from a text to its sentences.

    keep_newlines: keep the white space between sentences, at the end of the one before it.
    Raises DataError if nltk has no model of the language, PlatformError if there is no nltk.
    """
    model = _find_model(language)
    # After the model was found: `_find_model` explains a missing nltk.
    from nltk.tokenize import punkt

    class SpaceKeepingVars(punkt.PunktLanguageVars):
        _period_context_fmt = KEEP_SPACE_PATTERN

    variables = SpaceKeepingVars() if keep_newlines else punkt.PunktLanguageVars()
    tokenizer = punkt.PunktSentenceTokenizer(punkt.load_punkt_params(model), lang_vars=variables)

    def split(text: str) -> list[str]:
        pieces = (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))
        return [sentence for piece in pieces for sentence in tokenizer.tokenize(piece)]

    return split


def hash_sentence_model(language: str) -> str:
    """Return the SHA-256 of the model's files, which shape the output like the tokenizer does.

    Raises DataError if nltk has no model of the language, PlatformError if there is no nltk.
    """
    model = _find_model(language)
    digest = hashlib.sha256()
    try:
        for name in MODEL_FILES:
            with model.join(name).open() as file:
                # The byte between two files: moving text from the end of one to the start of the next changes the hash.
                digest.update(file.read() + b"\0")
    except OSError as error:
        raise _no_model(language) from error
    return digest.hexdigest()


def _find_model(language: str) -> Any:
    """Return nltk's pointer to the folder, which may be in an archive: in NLTK_DATA, then in the usual places."""
    try:
        import nltk.data
    except ImportError as error:
        raise PlatformError("split-sentences: nltk must be installed. Install it with `pip install nltk`.") from error
    try:
        return nltk.data.find(f"{MODEL_FOLDER}/{language}/")
    except (LookupError, ValueError) as error:
        raise _no_model(language) from error


def _no_model(language: str) -> DataError:
    return DataError(
        f"split-sentences: nltk must have its Punkt model of language {language}, got none in {MODEL_FOLDER}. "
        "Fetch it with `python -m nltk.downloader punkt_tab`, or set NLTK_DATA to the folder that holds "
        f"{MODEL_FOLDER}/{language}, or pass another --lang."
    )
