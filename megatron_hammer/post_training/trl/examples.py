"""The data of a run as token ids: every record read, checked and encoded here, and each one that is left out named."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_hammer.data.conversations.formats import (
    ConversationError,
    Fields,
    read_conversation,
    read_preference,
)
from megatron_hammer.data.conversations.records import iterate_records
from megatron_hammer.errors import DataError
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.post_training.trl.preferences import encode_pair
from megatron_hammer.post_training.trl.recipe import Stage

NOT_LEARNED = -100  # the label that transformers leaves out of the loss

type Example = dict[str, list[int]]
type Encode = Callable[[Fields], Example]


@dataclass(kw_only=True, slots=True)
class Examples:
    """num_records: of all files, held out or not. dropped: `file:line` of each unused record, by reason."""

    examples: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    num_records: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 of everything that is trained or scored."""
        hasher = hashlib.sha256()
        for example in (*self.examples, {}, *self.held_out):
            hasher.update(repr(example).encode())
        return hasher.hexdigest()


def load_examples(
    stage: Stage,
    data: Sequence[str],
    held_out_data: Sequence[str],
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    show: Callable[[str], None],
) -> Examples:
    """Read and encode the data of a stage; a record that cannot be used is named to `show`, counted and left out.

    max_length: of a conversation, in tokens. Raises DataError where no record can be used, and for a file that
    cannot be read.
    """
    loaded = Examples()
    encode = _choose_encoding(stage, tokenizer, max_length)
    for inputs, examples in ((data, loaded.examples), (held_out_data, loaded.held_out)):
        for place, read in iterate_records(inputs) if inputs else ():
            loaded.num_records += 1
            try:
                examples.append(encode(read()))
            except ConversationError as error:
                loaded.dropped.setdefault(error.reason, []).append(place)
                show(f"left out: {place}: {error}")
        if inputs and not examples:
            reasons = ", ".join(f"{len(places):,} {reason}" for reason, places in loaded.dropped.items())
            raise DataError(
                f"{' '.join(inputs)}: must hold a record that can be used, got {reasons or 'none'}. "
                "The lines above say why."
            )
    trained = set(map(repr, loaded.examples)) if loaded.held_out else set()
    if num_shared := sum(repr(example) in trained for example in loaded.held_out):
        show(
            f"note: {num_shared:,} of {len(loaded.held_out):,} held-out records are trained on too; the metrics say "
            "nothing about others"
        )
    return loaded


def _choose_encoding(stage: Stage, tokenizer: ChatTokenizer, max_length: int) -> Encode:
    """The columns that TRL's trainer of the stage reads."""

    def encode_conversation(fields: Fields) -> Example:
        encoded = tokenizer.encode(read_conversation(fields))
        ids, mask = encoded.ids.tolist(), encoded.mask.tolist()
        if len(ids) > max_length:
            fact = f"conversation must have at most {max_length} tokens, got {len(ids)}"
            raise ConversationError("too-long", fact, "Shorten it, or raise max_length")
        labels = [number if is_learned else NOT_LEARNED for number, is_learned in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def encode_preference(fields: Fields) -> Example:
        pair = encode_pair(read_preference(fields), tokenizer, max_length=max_length)
        if stage == "reward":
            return {"chosen_ids": pair.prompt + pair.chosen, "rejected_ids": pair.prompt + pair.rejected}
        return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}

    return encode_conversation if stage == "sft" else encode_preference
