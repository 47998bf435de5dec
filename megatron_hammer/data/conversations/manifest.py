"""`<prefix>.manifest.json` of conversations: that of every pair, and the template and masks they were made with.

It is the manifest of the preprocessor with more fields, so that what reads manifests of pairs, such as the check of a
run's tokenizer, reads these too.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.data.indexed.manifest import Manifest, manifest_path
from megatron_hammer.errors import DataError
from megatron_hammer.files.typed import read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateIdentity:
    """The chat template by name and content; its text, so that an exported model can carry it.

    end_of_turn_ids: the ids with which the assistant's turn ends; a server stops at them.
    """

    name: str
    sha256: str
    text: str
    end_of_turn_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationManifest(Manifest):
    """The record of one run; a document is a conversation, and `text_bytes` counts the rendered texts.

    num_records: conversations that were read; those written and those dropped add up to it. num_learned_tokens: tokens
    that the masks mark. num_dropped_by_reason: has a count for each reason in `problems`. shortened: one sentence for
    each conversation that lost turns to the maximum length. num_without_last_answer: conversations that end with a
    turn of somebody else than the assistant.
    """

    template: TemplateIdentity
    num_records: int
    num_learned_tokens: int
    num_dropped_by_reason: dict[str, int]
    shortened: tuple[str, ...]
    num_without_last_answer: int
    mask_bin_sha256: str | None = None
    mask_idx_sha256: str | None = None


def read_conversation_manifest(prefix: str | Path) -> ConversationManifest:
    """Read the manifest beside conversations; raises DataError if there is none, or one of other data."""
    path = manifest_path(prefix)
    remedy = "Write the conversations with hammer preprocess-conversations."
    if not path.is_file():
        raise DataError(f"{path}: manifest must lie beside conversations, got none. {remedy}")
    return read_json(path, ConversationManifest, remedy=remedy)
