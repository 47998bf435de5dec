"""A chat template for an exported folder, proven with the tokenizer, and compared there through transformers."""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_hammer.data.conversations.formats import Conversation, ConversationError
from megatron_hammer.data.conversations.manifest import find_template
from megatron_hammer.errors import ConversionError
from megatron_hammer.post_training.templates.chat_template import (
    GENERATION_MARK,
    ChatTemplate,
    load_chat_template,
    parse_bindings,
)
from megatron_hammer.post_training.templates.chat_tokenizer import ASSISTANT, ChatTokenizer
from megatron_hammer.post_training.templates.proof import list_probes, prove_template
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import SAMPLE_TEXTS
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers
from megatron_hammer.tokenizer.export.chat_format import ChatFormat


def build_chat_format(tokenizer_path: Path, template: ChatTemplate) -> ChatFormat:
    """Prove a template with a tokenizer; one without {% generation %} marks is passed on as it is, unproven.

    Raises ConfigError and DataError as `prove_template`.
    """
    if not GENERATION_MARK.search(template.text):
        return ChatFormat(template=template.text)
    tokenizer = ChatTokenizer(tokenizer_path, template)
    ids = prove_template(tokenizer)
    # A template that writes eos_token itself needs the tokenizer's own.
    ends = [text for text, number in tokenizer.controls.items() if number in ids]
    is_own_end = len(ends) == 1 and not re.search(r"\beos_token\b", template.text)
    return ChatFormat(
        template=template.text,
        end_of_turn_ids=ids,
        eos_token=ends[0] if is_own_end else None,
        control_tokens=sorted(tokenizer.controls),
        check=lambda folder: require_same_conversations(folder, tokenizer),
    )


def find_chat_format(
    tokenizer_path: Path, saved: Namespace, *, source: str | None, bindings: Sequence[str]
) -> ChatFormat | None:
    """The format that was asked for, or that of the conversations that a run was trained on, or None.

    source: a template's name or file. saved: the run's arguments.
    """
    if source is not None:
        template = load_chat_template(source, parse_bindings(bindings), is_marked=False)
        return build_chat_format(tokenizer_path, template)
    trained = find_trained_template(saved)
    return None if trained is None else build_chat_format(tokenizer_path, trained)


def find_trained_template(saved: Namespace) -> ChatTemplate | None:
    """The template of the conversations that a run was trained on; None where it was trained on none."""
    paths = [getattr(saved, name, None) or [] for name in ("data_path", "train_data_path")]
    identity = find_template([str(part) for path in paths for part in ([path] if isinstance(path, str) else path)])
    return None if identity is None else ChatTemplate(identity.name, identity.text, identity.bound_tokens)


def require_same_conversations(folder: Path, tokenizer: ChatTokenizer) -> int:
    """Return how many conversations have the same ids and masks in transformers as here; raises ConversionError."""
    theirs = load_with_transformers(folder)
    num_conversations = 0
    for conversation in _list_conversations(tokenizer):
        try:
            ours = tokenizer.encode(conversation)
        except ConversationError:
            continue  # a template may change texts, and refuses those then
        found = theirs.apply_chat_template(
            list(conversation.messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},  # no warning of texts that are longer than the model
        )
        num_conversations += 1
        if (list(found["input_ids"]), list(found["assistant_masks"])) != (ours.ids.tolist(), ours.mask.tolist()):
            raise ConversionError(
                f"{folder}: transformers must give a conversation the ids and the mask that it is trained with, got "
                f"others for {str(conversation.messages)[:80]}. Nothing was written; use another template."
            )
    return num_conversations


def _list_conversations(tokenizer: ChatTokenizer) -> Iterator[Conversation]:
    """Those of the proof, and texts that have told tokenizers apart, without control tokens: they are text here."""
    yield from list_probes(tokenizer)
    for text in SAMPLE_TEXTS:
        if text.strip() and not any(token in text for token in tokenizer.controls):
            yield Conversation(({"role": "user", "content": text}, {"role": ASSISTANT, "content": text}))
