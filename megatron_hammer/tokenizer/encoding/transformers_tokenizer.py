"""A tokenizer folder as users load it: with transformers' AutoTokenizer, which defines what a folder means."""

from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConversionError


def load_with_transformers(folder: Path) -> Any:
    """The folder's tokenizer; never runs code of the folder. Raises ConversionError if transformers refuses it."""
    import transformers  # takes seconds, and few callers need it

    try:
        # trust_remote_code: a folder may name Python files of its own, which are never run here.
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # Whatever transformers raises for a file that it does not understand: it has no error class of its own.
    except Exception as error:
        raise ConversionError(
            f"{folder}: transformers must load the tokenizer, got {type(error).__name__}: {str(error)[:300]}. "
            "Export from the SentencePiece model, or from a folder that needs no code of its own."
        ) from error
