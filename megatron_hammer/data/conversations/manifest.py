"""`<prefix>.manifest.json` of conversations: that of every pair, and the template and masks they were made with.

It is the manifest of the preprocessor with more fields, so that what reads manifests of pairs, such as the check of a
run's tokenizer, reads these too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.data.indexed.index_format import idx_path
from megatron_hammer.data.indexed.manifest import Manifest, manifest_path
from megatron_hammer.errors import DataError
from megatron_hammer.files.typed import read_json


def mask_prefix(prefix: str | Path) -> Path:
    """The prefix of the masks of conversations."""
    return Path(f"{prefix}_loss_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateIdentity:
    """The chat template by name and content; its text, so that an exported model can carry it.

    end_of_turn_ids: the ids with which the assistant's turn ends; a server stops at them. bound_tokens: which the
    template writes in the place of its own control tokens.
    """

    name: str
    sha256: str
    text: str
    end_of_turn_ids: tuple[int, ...]
    bound_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationManifest(Manifest):
    """The record of one run; a document is a conversation, and `text_bytes` counts the rendered texts.

    num_records: conversations that were read; those written and those dropped add up to it. num_learned_tokens: tokens
    that the masks mark. num_dropped_by_reason: has a count for each reason in `problems`. shortened: one sentence for
    each conversation that lost turns to the maximum length. num_without_last_answer: conversations that end with a
    turn of somebody else than the assistant. num_joined_answers: answers that begin inside the last token of their
    header, as where both have a line end there: a model that is given the header cannot begin so.
    """

    template: TemplateIdentity
    num_records: int
    num_learned_tokens: int
    num_dropped_by_reason: dict[str, int]
    shortened: tuple[str, ...]
    num_without_last_answer: int
    num_joined_answers: int = 0
    mask_bin_sha256: str | None = None
    mask_idx_sha256: str | None = None


def read_conversation_manifest(prefix: str | Path) -> ConversationManifest:
    """Read the manifest beside conversations; raises DataError if there is none, or one of other data."""
    path = manifest_path(prefix)
    remedy = "Write the conversations with hammer preprocess-conversations."
    if not path.is_file():
        raise DataError(f"{path}: manifest must lie beside conversations, got none. {remedy}")
    if not idx_path(mask_prefix(prefix)).is_file() and "template" not in read_json(path, dict, remedy=remedy):
        raise DataError(f"{path}: data must be conversations, got text without loss masks. {remedy}")
    return read_json(path, ConversationManifest, remedy=remedy)


def find_template(data_path: Iterable[str]) -> TemplateIdentity | None:
    """The template of the conversations among the parts of a --data-path, which may also hold weights; None if none.

    Conversations that are not here any more are no part. Raises DataError if they have different templates.
    """
    found: dict[str, str] = {}
    template = None
    for prefix in data_path:
        # Only conversations have a template in their manifest; corpora may stand beside them.
        if not manifest_path(prefix).is_file() or not idx_path(mask_prefix(prefix)).is_file():
            continue
        template = read_conversation_manifest(prefix).template
        found.setdefault(template.sha256, prefix)
    if len(found) > 1:
        raise DataError(
            f"data-path: conversations of one model must have one template, got several in "
            f"{' and '.join(found.values())}. Name the one to export: --chat-template."
        )
    return template
