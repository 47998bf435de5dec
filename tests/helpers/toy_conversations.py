"""Conversations in the stored format, made of random tokens, with masks that are all different."""

from pathlib import Path

import numpy as np

from megatron_hammer.data.conversations.manifest import ConversationManifest, TemplateIdentity
from megatron_hammer.data.conversations.pair import ConversationWriter
from megatron_hammer.data.indexed.manifest import TokenizerIdentity

Conversation = tuple[np.ndarray, np.ndarray]  # tokens, mask


def draw_conversations(
    num_conversations: int, *, vocab_size: int, longest: int, shortest: int = 3, seed: int = 3
) -> list[Conversation]:
    """Turns of a user and of an assistant, who is learned; each conversation ends with a learned token."""
    generator = np.random.default_rng(seed)
    conversations = []
    for length in generator.integers(shortest, longest + 1, num_conversations):
        tokens = generator.integers(1, vocab_size, length)
        mask = generator.random(length) < 0.5
        mask[0], mask[-1] = False, True
        conversations.append((tokens, mask.astype(np.uint8)))
    return conversations


def write_conversations(prefix: Path, conversations: list[Conversation], *, vocab_size: int) -> str:
    """Returns the prefix, as a flag takes it."""
    tokens, masks = (np.concatenate(parts) for parts in zip(*conversations, strict=True))
    lengths = [len(ids) for ids, _ in conversations]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with ConversationWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(tokens.astype(np.uint16), masks, lengths)
        writer.finish()
        writer.publish(describe(tokens, masks, lengths, vocab_size=vocab_size))
    return str(prefix)


def describe(tokens: np.ndarray, masks: np.ndarray, lengths: list[int], *, vocab_size: int) -> ConversationManifest:
    return ConversationManifest(
        sources=(),
        ignored_files=(),
        tokenizer=TokenizerIdentity(name="toy", sha256="0" * 64, vocab_size=vocab_size),
        options={},
        dtype="uint16",
        num_documents=len(lengths),
        num_sequences=len(lengths),
        num_tokens=len(tokens),
        text_bytes=0,
        num_empty_documents=0,
        problems=(),
        tool_version="tests",
        template=TemplateIdentity(name="toy", sha256="0" * 64, text="", end_of_turn_ids=(1,)),
        num_records=len(lengths),
        num_learned_tokens=int(masks.sum()),
        num_dropped_by_reason={},
        shortened=(),
        num_without_last_answer=0,
    )
