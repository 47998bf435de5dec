"""Encode blocks of records as conversations: the part of preprocessing that runs in the workers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_hammer.corpus.blocks import Block, Position, split_block
from megatron_hammer.data.conversations.formats import Conversation, ConversationError, parse_record, read_conversation
from megatron_hammer.data.conversations.pair import MASK_DTYPE
from megatron_hammer.data.indexed.pair import select_dtype
from megatron_hammer.post_training.templates.chat_template import ChatTemplate
from megatron_hammer.post_training.templates.chat_tokenizer import ASSISTANT, ChatTokenizer, EncodedConversation

Overlong = Literal["drop", "cut-turns", "error"]
OVERLONG_POLICIES: tuple[Overlong, ...] = ("drop", "cut-turns", "error")
TOO_LONG = "too-long"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordOptions:
    """How a record becomes a conversation; all of it shapes the bytes.

    format: of FORMATS, or auto. system: for conversations without a system text. max_length: in tokens, or None.
    overlong: what becomes of longer ones: they are dropped, lose turns at their end, or are errors.
    """

    format: str = "auto"
    system: str | None = None
    max_length: int | None = None
    overlong: Overlong = "drop"


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """The conversations of a block, one after another: ids [n] in the output's dtype, mask [n], their lengths.

    dropped: place in the block from 0, reason and sentence of each record left out. shortened: place and sentence.
    """

    begin: Position
    ids: np.ndarray
    mask: np.ndarray
    lengths: tuple[int, ...]
    text_bytes: int
    num_without_last_answer: int
    num_joined_answers: int
    dropped: tuple[tuple[int, str, str], ...]
    shortened: tuple[tuple[int, str], ...]


class ConversationBlockEncoder:
    """Made once in each worker."""

    def __init__(self, options: RecordOptions, tokenizer: ChatTokenizer):
        self._options = options
        self._tokenizer = tokenizer
        self._dtype = select_dtype(tokenizer.encoder.vocab_size)

    def encode(self, block: Block) -> EncodedBlock:
        encoded: list[EncodedConversation] = []
        dropped, shortened = [], []
        num_without_last_answer = 0
        for place, payload in enumerate(split_block(block)):
            try:
                fields = parse_record(block.kind, payload)
                conversation = read_conversation(fields, self._options.format, system=self._options.system)
                whole = self._tokenizer.encode(conversation)
                kept = self._fit(whole)
            except ConversationError as error:
                dropped.append((place, error.reason, str(error)))
                continue
            encoded.append(kept)
            if kept is not whole:
                lost = f"lost {len(whole.ids) - len(kept.ids):,} of {len(whole.ids):,} tokens"
                turns = f"{len(kept.turn_ends)} of {len(whole.turn_ends)} answers are kept"
                shortened.append((place, f"{lost}: {turns}"))
            elif _ends_without_answer(conversation):
                num_without_last_answer += 1
        return EncodedBlock(
            begin=block.begin,
            ids=np.concatenate([part.ids for part in encoded] or [np.empty(0)]).astype(self._dtype),
            mask=np.concatenate([part.mask for part in encoded] or [np.empty(0)]).astype(MASK_DTYPE),
            lengths=tuple(len(part.ids) for part in encoded),
            text_bytes=sum(part.text_bytes for part in encoded),
            num_without_last_answer=num_without_last_answer,
            num_joined_answers=sum(part.num_joined_answers for part in encoded),
            dropped=tuple(dropped),
            shortened=tuple(shortened),
        )

    def _fit(self, encoded: EncodedConversation) -> EncodedConversation:
        """Return the conversation, or as many of its turns as fit; raises ConversationError if none do."""
        limit = self._options.max_length
        if limit is None or len(encoded.ids) <= limit:
            return encoded
        ends = [end for end in encoded.turn_ends if end <= limit] if self._options.overlong == "cut-turns" else []
        if not ends:
            raise ConversationError(
                TOO_LONG,
                f"conversation must have at most {limit:,} tokens, got {len(encoded.ids):,}",
                "Raise --max-length or choose another --overlong",
            )
        # Directly behind the end of a turn, so that nothing is learned that does not end.
        end = ends[-1]
        return replace(encoded, ids=encoded.ids[:end], mask=encoded.mask[:end], turn_ends=tuple(ends))


def _ends_without_answer(conversation: Conversation) -> bool:
    return conversation.messages[-1]["role"] != ASSISTANT


@dataclass(frozen=True, slots=True)
class BlockEncoderRecipe:
    """What a worker needs to build its encoder; can be sent to it."""

    options: RecordOptions
    tokenizer_path: Path
    template: ChatTemplate

    def __call__(self) -> Callable[[Block], EncodedBlock]:
        return ConversationBlockEncoder(self.options, ChatTokenizer(self.tokenizer_path, self.template)).encode
