"""Compare what transformers loads from two folders: the tokenizer that a user has, and the one that was written.

Equal ids of some texts prove little: special tokens, added tokens, the chat template and what is put around a text by
default live in other files, and transformers may add a normaliser because of the class that these files name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import SAMPLE_TEXTS
from megatron_hammer.tokenizer.encoding.special_tokens import CONFIG_NAME, read_config
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SHOWN_CHARS = 200
CONVERSATIONS = (
    [{"role": "user", "content": "Hello, world! 你好"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ],
)


def require_loaded_alike(source: Path, copy_dir: Path) -> int | None:
    """Return how many facts of both folders are equal; None if transformers cannot load `source`.

    Raises ConversionError with a sentence for every fact that differs.
    """
    try:
        expected = load_with_transformers(source)
    except ConversionError:
        return None  # a tokenizer.json that names no class; its ids are compared elsewhere
    facts, copied = dict(_list_facts(expected)), dict(_list_facts(load_with_transformers(copy_dir), like=expected))
    problems = [
        f"{copy_dir}: {name} must be that of {source}, got {str(copied[name])[:SHOWN_CHARS]} for "
        f"{str(value)[:SHOWN_CHARS]}. Nothing was written; pass --no-tokenizer and copy its files yourself."
        for name, value in facts.items()
        if copied[name] != value
    ]
    if problems:
        raise ConversionError(*problems)
    return len(facts)


def pin_tokenizer(source: Path, target_dir: Path) -> None:
    """Write what transformers makes of `source` so that it loads alike beside every config.json.

    transformers chooses the class by `model_type`, and a class may have a normaliser or a side of padding of its own.
    """
    tokenizer = load_with_transformers(source)
    tokenizer.save_pretrained(target_dir)
    path = target_dir / CONFIG_NAME
    sides = {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    # This class takes tokenizer.json as it is.
    config = read_config(path) | {"tokenizer_class": "TokenizersBackend"} | sides
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _list_facts(tokenizer: Any, like: Any = None) -> Iterator[tuple[str, Any]]:
    """Names and values; `like` is the tokenizer whose special tokens are spelt out in texts."""
    # Not the class: what it does is compared, and a pinned tokenizer has another one.
    yield "number of tokens", len(tokenizer)
    for name in NAMED_TOKENS:
        yield name, (getattr(tokenizer, name), getattr(tokenizer, f"{name}_id"))
    yield "ids of all special tokens", sorted(tokenizer.all_special_ids)
    yield "added tokens", {number: repr(token) for number, token in sorted(tokenizer.added_tokens_decoder.items())}
    for name in ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        yield name, getattr(tokenizer, name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        yield part, repr(getattr(backend, part, None))
    yield "chat template", tokenizer.chat_template
    for number, conversation in enumerate(CONVERSATIONS, start=1):
        yield f"chat template, conversation {number}", _render(tokenizer, conversation)
    special = [str(token) for token in (like or tokenizer).added_tokens_decoder.values()]
    texts = [*SAMPLE_TEXTS, *special, "a".join(special), " ".join(special)]
    yield "ids of texts", [tokenizer(text, verbose=False)["input_ids"] for text in texts]


def _render(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    try:
        return render_conversation(tokenizer, conversation)
    # Both must refuse a conversation alike.
    except ConversionError as error:
        return str(error)


def render_conversation(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    """The prompt that the chat template of a tokenizer of transformers makes; ConversionError if it makes none."""
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    # A template may refuse a conversation in any way.
    except Exception as error:
        raise ConversionError(f"{type(error).__name__}: {error}") from error
