"""A preference as token ids: one prompt and two answers, each checked before anything is trained with it.

The readers of conversations refuse records without a prompt or without a text. Here is what a pair must fulfil besides:
two answers that differ, not too long, with the same tokens before both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_hammer.data.conversations.formats import Conversation, ConversationError, Preference
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer, EncodedConversation


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids: of the prompt with the header of the answer, and of each answer with its end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def encode_pair(preference: Preference, tokenizer: ChatTokenizer, *, max_length: int) -> EncodedPair:
    """Return a pair as token ids; raises ConversationError, with a reason to count it under, if it cannot be used.

    max_length: of the prompt with either answer, in tokens.
    """
    equal = ConversationError("equal-answers", "chosen and rejected answer must differ, got the same one twice")
    if _strip(preference.chosen) == _strip(preference.rejected):
        raise equal
    prompt = preference.prompt
    encoded = {
        name: tokenizer.encode(Conversation([*prompt.messages, *answer], prompt.tools))
        for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected))
    }
    for name, one in encoded.items():
        if one.turn_ends[-1] > max_length:
            raise ConversationError(
                "too-long",
                f"prompt and {name} answer must have at most {max_length} tokens, got {one.turn_ends[-1]}",
                "Shorten it, or raise max_length",
            )
    num_earlier = sum(message.get("role") == "assistant" for message in prompt.messages)
    starts = [_find_start(one, num_earlier) for one in encoded.values()]
    chosen, rejected = (one.ids[: one.turn_ends[-1]].tolist() for one in encoded.values())
    if chosen == rejected:  # they differ in what the template does not write, such as the ids of calls
        raise equal
    start = starts[0]
    if starts[1] != start or chosen[:start] != rejected[:start]:
        # A token may join the last character of the prompt and the first of an answer.
        raise ConversationError("prompts-differ", "both answers must follow the same tokens, got two prompts")
    return EncodedPair(chosen[:start], chosen[start:], rejected[start:])


def _strip(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without the spaces around texts, which many templates take off."""
    return [
        {name: value.strip() if isinstance(value, str) else value for name, value in message.items()}
        for message in messages
    ]


def _find_start(encoded: EncodedConversation, num_earlier: int) -> int:
    """Where the first learned token behind the earlier turns of the assistant lies."""
    begin = encoded.turn_ends[num_earlier - 1] if num_earlier else 0
    return begin + int(np.flatnonzero(encoded.mask[begin:])[0])
