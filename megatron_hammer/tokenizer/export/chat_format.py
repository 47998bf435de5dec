"""The chat template in an exported folder, and what else of the tokenizer's settings conversations need.

Called after the folder has been compared with the original tokenizer: from here on it differs from it on purpose, and
every difference is a note. Not here: what a template must fulfil (post_training/templates/proof.py).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.tokenizer.encoding.special_tokens import CONFIG_NAME, OLD_MAP_NAME, read_config, read_name

TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How a model chats.

    template: Jinja text. end_of_turn_ids: at which generation stops. eos_token: what the tokenizer calls its end, where
    that is the end of a turn; None leaves it. control_tokens: those that no text of a user should become.
    check: is given the complete folder, and returns how many conversations it has compared; raises HammerError.
    """

    template: str
    end_of_turn_ids: Sequence[int] = ()
    eos_token: str | None = None
    control_tokens: Sequence[str] = ()
    check: Callable[[Path], int] = lambda folder: 0


def write_chat_format(folder: Path, chat: ChatFormat) -> tuple[str, ...]:
    """Add the template to a folder that transformers can load, and return notes of what else was changed in it."""
    # A file of its own: transformers prefers it to the field of tokenizer_config.json.
    (folder / TEMPLATE_NAME).write_text(chat.template, encoding="utf-8")
    config = read_config(folder / CONFIG_NAME)
    notes = []
    if chat.control_tokens and config.get("split_special_tokens"):
        config["split_special_tokens"] = False
        notes.append(
            "split_special_tokens is off in this folder, or the template's control tokens would be text in "
            "transformers. A control token that a user spells out is that token there, unless apply_chat_template is "
            "called with sanitize_control_tokens=True"
        )
    if chat.control_tokens:
        config["chat_control_tokens"] = list(chat.control_tokens)
    if chat.eos_token is not None and read_name(config, "eos_token") != chat.eos_token:
        notes.append(f"eos_token is {chat.eos_token} in this folder, so that whatever loads it stops at the turn's end")
        config["eos_token"] = chat.eos_token
        _replace_in_old_map(folder, chat.eos_token)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tuple(notes)


def _replace_in_old_map(folder: Path, eos_token: str) -> None:
    """transformers prefers this older file where the config lists no added tokens."""
    path = folder / OLD_MAP_NAME
    if "eos_token" in (old := read_config(path)):
        path.write_text(json.dumps(old | {"eos_token": eos_token}, indent=2, ensure_ascii=False) + "\n")
