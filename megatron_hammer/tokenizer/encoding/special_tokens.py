"""Which tokens begin and end a document: what transformers' AutoTokenizer says of the same folder, and never a guess.

The files of a folder name them in an order of precedence that is repeated here, since transformers takes seconds to
load. Where they name none, the class of the tokenizer may still have a default, and transformers itself is asked.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.errors import ConversionError, DataError
from megatron_hammer.files.read import is_present
from megatron_hammer.files.typed import read_json
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

SpecialToken = Literal["bos_token", "eos_token"]
SPECIAL_TOKENS: tuple[SpecialToken, ...] = ("bos_token", "eos_token")
CONFIG_NAME = "tokenizer_config.json"
OLD_MAP_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"


@dataclass(slots=True)
class SpecialTokens:
    """The ids of `bos_token` and `eos_token`; can be sent to another process.

    path: the tokenizer's file. ids: None where the tokenizer has no such token. problems: a sentence where the id is
    in doubt. A token that is in neither is asked of transformers when it is first needed.
    """

    path: Path
    ids: dict[SpecialToken, int | None] = field(default_factory=dict)
    problems: dict[SpecialToken, str] = field(default_factory=dict)

    def find(self, key: SpecialToken) -> int | None:
        """Return the id; raises DataError where it is in doubt."""
        if key not in self.ids and key not in self.problems:
            self._ask_transformers(key)
        if key in self.problems:
            raise DataError(self.problems[key])
        return self.ids[key]

    def _ask_transformers(self, key: SpecialToken) -> None:
        try:
            tokenizer = load_with_transformers(self.path.parent)
        except ConversionError:
            # A tokenizer.json alone, without a class: it names no such token, and there is nobody to ask.
            self.ids[key] = None
            return
        name = getattr(tokenizer, key)
        # The vocabulary of the file: transformers adds a token that is missing from it, with an id of its own.
        vocabulary = json.loads(self.path.read_bytes())
        known = vocabulary["model"]["vocab"] if isinstance(vocabulary["model"]["vocab"], dict) else {}
        known = known | {token["content"]: token["id"] for token in vocabulary.get("added_tokens") or []}
        self.record(key, name, known.get)

    def record(self, key: SpecialToken, name: str | None, find_id: Callable[[str], int | None]) -> None:
        """Note the id of a token that is known by name; None: the tokenizer has no such token."""
        self.ids[key] = None if name is None else find_id(name)
        if name is not None and self.ids[key] is None:
            self.problems[key] = (
                f"{self.path}: {key} must be in the vocabulary, got {key}={name!r}, which is not: transformers gives "
                "it an id behind the vocabulary. Save the tokenizer again with AutoTokenizer's save_pretrained."
            )


def find_special_tokens(path: Path, find_id: Callable[[str], int | None]) -> SpecialTokens:
    """What the files beside the tokenizer file `path` say. find_id: the id of a token's text.

    Raises DataError for a file that is not JSON.
    """
    config, old_map = read_config(path.with_name(CONFIG_NAME)), read_config(path.with_name(OLD_MAP_NAME))
    found = SpecialTokens(path)
    for key in SPECIAL_TOKENS:
        # transformers reads the old file only where the new one does not list the added tokens, and prefers it then.
        source = old_map if "added_tokens_decoder" not in config and key in old_map else config
        if key in source:
            found.record(key, read_name(source, key), find_id)
            if source[key] is not None and found.ids[key] is None and key not in found.problems:
                found.problems[key] = (
                    f"{path}: {key} must be a text or an object with one as content, got {key}={source[key]!r}. "
                    "Save the tokenizer again with AutoTokenizer's save_pretrained."
                )
        elif not config and not is_present(path.with_name("config.json")):
            found.ids[key] = None  # nothing names a class that could have a default
    return found


def list_named_tokens(folder: Path) -> set[str]:
    """The texts of all tokens that the files beside a tokenizer file name: special ones and added ones."""
    config, old_map = read_config(folder / CONFIG_NAME), read_config(folder / OLD_MAP_NAME)
    named = set(read_config(folder / ADDED_TOKENS_NAME))
    # A dictionary by id; whatever else has its name is transformers' to judge.
    named |= _list_texts(config.get("added_tokens_decoder"))
    for source in (config, old_map):
        for key, value in source.items():
            if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
                named |= _list_texts(value)
    return named


def _list_texts(value: Any) -> set[str]:
    """The texts in a token, a list of them, or a dictionary of them."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, list):
        return {text for item in value for text in _list_texts(item)}
    if isinstance(value, dict):
        return _list_texts(value["content"]) if "content" in value else _list_texts([*value.values()])
    return set()


def read_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json or a file like it; empty if there is none. Raises DataError if it is not an object."""
    return read_json(path, dict[str, Any], remedy="Repair or remove it.") if is_present(path) else {}


def read_name(config: dict[str, Any], key: str) -> str | None:
    """The name of a special token: a plain text or the content of an AddedToken object."""
    value = config.get(key)
    # transformers writes both forms, by its version.
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None
