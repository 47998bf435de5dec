"""A conversation as token ids and a loss mask, in which control tokens come from the template alone.

Text of a user that spells a control token out, such as `<|im_end|>`, stays text. Before a conversation is rendered,
such places in it get a mark. In the rendered text every control token that is not marked was written by the template,
and becomes a stand-in: a token of a copy of the tokenizer, in which control tokens themselves are plain text. The whole
text is then encoded at once, so that ordinary conversations have the ids that transformers gives them, and every
stand-in becomes the id of its token. A control id from anywhere else is an error and is never written.
"""

import itertools
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers

from megatron_hammer.data.conversations.formats import Conversation, ConversationError
from megatron_hammer.errors import ConversionError, DataError
from megatron_hammer.post_training.templates.chat_template import CONTROL_FORM, ChatTemplate
from megatron_hammer.tokenizer.encoding.encoder import Encoder, HuggingFaceEncoder, SentencePieceEncoder, load_encoder
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import (
    SAMPLE_TEXTS,
    build_fast_tokenizer,
    check_same_encoding,
)
from megatron_hammer.tokenizer.encoding.sentencepiece_model import WHITESPACE_SYMBOL, read_sentencepiece_model
from megatron_hammer.tokenizer.encoding.special_tokens import CONFIG_NAME, read_config, read_name

# Noncharacters of Unicode, which no text should hold; a conversation that does is refused.
MARK, STAND_IN = "\ufdd0", "\ufdd1"
ASSISTANT = "assistant"
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")  # as transformers knows them
PLAIN_PROBE = Conversation(({"role": "user", "content": "aa"}, {"role": ASSISTANT, "content": "bb"}))


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """ids [n] int32 and mask [n] uint8, 1 where a token is learned as a target.

    turn_ends: behind the last token of each turn of the assistant, in tokens. text_bytes: of the rendered text.
    num_joined_answers: turns of the assistant that begin inside the last token of their header.
    """

    ids: np.ndarray
    mask: np.ndarray
    turn_ends: tuple[int, ...]
    text_bytes: int
    num_joined_answers: int = 0


class ChatTokenizer:
    """Encodes conversations by one template and one tokenizer; made once in each process, as that takes a second.

    path: a SentencePiece model, a tokenizer.json, or a folder of either. Raises DataError if the tokenizer is damaged
    or has no exact form in the `tokenizers` library. proof.py says whether template and tokenizer fit together.
    """

    def __init__(self, path: str | Path, template: ChatTemplate):
        self.template = template
        self.encoder: Encoder = load_encoder(path)
        # As transformers would have it: with control tokens found in text. The proof compares with it.
        self.plain = _build_plain_tokenizer(self.encoder)
        self.special_tokens = _list_special_tokens(self.encoder, self.plain)
        added = self.plain.get_added_tokens_decoder()
        vocabulary = self.plain.get_vocab(with_added_tokens=True)
        named = {vocabulary[text]: tokenizers.AddedToken(text) for text in self.special_tokens.values()}
        written = self._list_written([token.content for token in added.values() if not token.special])
        written.update(template.bound_tokens)
        self.controls = {
            token.content: number
            for number, token in (named | added).items()
            if token.special or number in named or token.content in written or CONTROL_FORM.fullmatch(token.content)
        }
        flags = {token.content: token for token in (named | added).values()}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.controls, key=len, reverse=True))) or "(?!)")
        self._marked = re.compile(f"{MARK}(?:{self._pattern.pattern})|{MARK}|({self._pattern.pattern})")
        self._tokenizer, self._ids_by_stand_in = _build_text_tokenizer(self.plain, self.controls, flags)
        self._stand_ins = {text: _spell_stand_in(number) for text, number in self.controls.items()}
        self._control_ids = np.array(sorted(self.controls.values()), dtype=np.int64)

    def render(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """As the template's `render`, with the special tokens of this tokenizer."""
        return self.template.render(conversation, self.special_tokens, add_generation_prompt=add_generation_prompt)

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Return ids and mask; raises ConversationError, with a reason to count it under, if it cannot be used."""
        _refuse_bad_texts(conversation)
        marked = _map_texts(conversation, self._mark)
        rendered, spans = self.render(marked)
        text, spans = self._replace_controls(rendered, spans)
        whole = rendered.replace(MARK, "")
        self._refuse_lost_text(conversation, whole)
        if any(MARK in text for text in _list_texts(marked)):
            self._refuse_changed_marks(conversation, whole)
        self._refuse_changed_turns(conversation, whole)
        num_answers = sum(message.get("role") == ASSISTANT for message in conversation.messages)
        if not num_answers:
            raise ConversationError("nothing-to-learn", "conversation must have a turn of the assistant, got none")
        if len(spans) != num_answers:
            raise ConversationError(
                "refused-by-template",
                f"chat template {self.template.name} must mark every turn of the assistant, got {len(spans)} marked of "
                f"{num_answers}",
            )
        return self._encode_text(text, spans)

    def spell(self, number: int) -> str:
        """The text of one token; as the tokenizer writes it where it is a part of a character."""
        token = self.plain.id_to_token(number) or ""
        if number in self._ids_by_stand_in.values() or WHITESPACE_SYMBOL in token:
            return token.replace(WHITESPACE_SYMBOL, " ")
        text = self.plain.decode([number], skip_special_tokens=False)
        return token if "\ufffd" in text else text or token

    def control_sequence(self, conversation: Conversation) -> list[str]:
        """The control tokens that the template writes for a conversation, in order."""
        rendered, _ = self.render(_map_texts(conversation, self._mark))
        return [found[1] for found in self._marked.finditer(rendered) if found[1]]

    def _list_written(self, symbols: list[str]) -> set[str]:
        """The symbols, which are found in every text, with which the template lays out turns or ends the assistant's.

        Tags that it writes elsewhere, as around calls of tools, stay symbols: assistants write them too.
        """
        try:
            rendered, spans = self.render(PLAIN_PROBE)
        except ConversationError:
            return set()  # the proof will say so
        ends = {text for text in symbols if any(rendered[:end].endswith(text) for _, end in spans)}
        for start, end in reversed(spans):
            rendered = rendered[:start] + "\0" + rendered[end:]
        return ends | {text for text in symbols if text[:1] + text[-1:] in ("<>", "[]") and text in rendered}

    def _encode_text(self, text: str, spans: list[tuple[int, int]]) -> EncodedConversation:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        raw_ids = np.array(encoding.ids, dtype=np.int64)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        self._refuse_injected(raw_ids)
        ids = np.array([self._ids_by_stand_in.get(number, number) for number in encoding.ids], dtype=np.int32)
        mask = np.zeros(len(ids), dtype=np.uint8)
        turn_ends, num_joined = [], 0
        for start, end in spans:
            inside = np.flatnonzero((ends > start) & (starts < end))
            if not len(inside) or int(raw_ids[inside[-1]]) not in self._ids_by_stand_in:
                raise ConversationError(
                    "refused-by-template",
                    f"chat template {self.template.name} must end every turn of the assistant with a control token "
                    "inside {% generation %}, got one without",
                )
            # From the first to the last: a token that lies in both the header and the answer is learned.
            mask[inside[0] : inside[-1] + 1] = 1
            turn_ends.append(int(inside[-1]) + 1)
            num_joined += int(starts[inside[0]] < start)
        return EncodedConversation(ids, mask, tuple(turn_ends), len(text.encode()), num_joined)

    def _mark(self, text: str) -> str:
        return self._pattern.sub(lambda found: MARK + found[0], text)

    def _replace_controls(self, rendered: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Write stand-ins for the control tokens of the template, take the marks off, and move the spans with them."""
        parts, places, shifts, size, position = [], [0], [0], 0, 0
        for found in self._marked.finditer(rendered):
            replacement = self._stand_ins[found[1]] if found[1] else found[0].removeprefix(MARK)
            parts += [rendered[position : found.start()], replacement]
            size += found.start() - position + len(replacement)
            position = found.end()
            places.append(position)
            shifts.append(size - position)
        parts.append(rendered[position:])

        def move(place: int) -> int:
            return place + shifts[bisect_right(places, place) - 1]

        return "".join(parts), [(move(start), move(end)) for start, end in spans]

    def _refuse_injected(self, raw_ids: np.ndarray) -> None:
        """Raise DataError for a control id that is not from the template: the tokenizer made it of plain text."""
        injected = raw_ids[np.isin(raw_ids, self._control_ids)]
        if len(injected):
            token = self.plain.id_to_token(int(injected[0]))
            raise DataError(
                f"{self.encoder.path}: a control token must never be made of text, got {token!r}, which the tokenizer "
                "finds in plain text. Use another token for this purpose: --bind-token."
            )

    def _refuse_changed_marks(self, conversation: Conversation, rendered: str) -> None:
        """A template that cuts, measures or escapes texts can part a mark from its token, which then were a control."""
        if self.render(conversation)[0] != rendered:
            raise ConversationError(
                "refused-by-template",
                f"chat template {self.template.name} must write a text that spells a control token as it is, got "
                "another text for it: the template cuts, measures or escapes texts",
            )

    def _refuse_lost_text(self, conversation: Conversation, rendered: str) -> None:
        """A template can leave out what it does not know, such as tools or reasoning, without any error."""
        # As often as it is said: an answer may repeat what the user wrote, and be left out none the less.
        for text, count in Counter(_list_required(conversation)).items():
            spellings = {text, *(json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))}
            if sum(map(rendered.count, spellings)) < count:
                raise ConversationError(
                    "text-lost",
                    f"chat template {self.template.name} must write every text, got {text[:60]!r}, which it leaves out "
                    "or changes",
                )

    def _refuse_changed_turns(self, conversation: Conversation, whole: str) -> None:
        """The proof is about plain turns; tools and calls may make a template write a turn otherwise once it is over.

        Such as one that moves the schemas of tools to the last question, or a later system text to the beginning.
        """
        messages = conversation.messages
        is_plain = all(message["role"] in ("user", ASSISTANT) for message in messages[1:])
        if is_plain and not (conversation.tools or any(message.keys() - {"role", "content"} for message in messages)):
            return
        answers = [number for number, message in enumerate(messages, start=1) if message["role"] == ASSISTANT]
        for number in answers[:-1]:
            part, _ = self.render(Conversation(messages[:number], conversation.tools))
            if not whole.startswith(part):
                raise ConversationError(
                    "refused-by-template",
                    f"chat template {self.template.name} must write a turn alike whatever follows it, got another text "
                    f"for the first {number} of {len(messages)} turns",
                )


def _build_plain_tokenizer(encoder: Encoder) -> tokenizers.Tokenizer:
    if isinstance(encoder, HuggingFaceEncoder):
        tokenizer = tokenizers.Tokenizer.from_buffer(encoder.read_definition())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:
        assert isinstance(encoder, SentencePieceEncoder)  # there are two kinds
        try:
            tokenizer = build_fast_tokenizer(read_sentencepiece_model(encoder.path), name=str(encoder.path))
            check_same_encoding(encoder, tokenizer, list(SAMPLE_TEXTS))
        except ConversionError as error:
            remedy = "Conversations need one that can be exported; pass a Hugging Face folder."
            problems = [problem.rsplit(" Pass --no-tokenizer", 1)[0] + f" {remedy}" for problem in error.problems]
            raise DataError(*problems) from error
    tokenizer.encode_special_tokens = False
    return tokenizer


def _list_special_tokens(encoder: Encoder, tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """The texts of bos_token and its like, by which templates name them."""
    ids = {"bos_token": encoder.bos_id, "eos_token": encoder.eod_id}
    found = {name: str(tokenizer.id_to_token(number)) for name, number in ids.items() if number is not None}
    folder = encoder.path if encoder.path.is_dir() else encoder.path.parent
    config = read_config(folder / CONFIG_NAME) if isinstance(encoder, HuggingFaceEncoder) else {}
    others = {name: read_name(config, name) for name in config if name.endswith("_token") and name not in ids}
    known = tokenizer.get_vocab(with_added_tokens=True)
    return found | {name: text for name, text in others.items() if text in known and text is not None}


def _build_text_tokenizer(
    plain: tokenizers.Tokenizer, controls: Mapping[str, int], flags: Mapping[str, tokenizers.AddedToken]
) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """A copy in which control tokens are text, and stand-ins for them are found; ids of tokens by those of stand-ins.

    What a token takes of the spaces around it, and whether it is looked for in normalised text, its stand-in does too.
    """
    definition = orjson.loads(plain.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["special"] or token["content"] in controls
    tokenizer = tokenizers.Tokenizer.from_buffer(orjson.dumps(definition))
    names = ("single_word", "lstrip", "rstrip", "normalized")
    stand_ins = {
        _spell_stand_in(number): (number, {name: getattr(flags[text], name) for name in names})
        for text, number in controls.items()
    }
    tokenizer.add_tokens([tokenizers.AddedToken(text, **options) for text, (_, options) in stand_ins.items()])
    # Special tokens are text now, and no stand-in is special.
    tokenizer.encode_special_tokens = True
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return tokenizer, {ids[text]: number for text, (number, _) in stand_ins.items()}


def _spell_stand_in(number: int) -> str:
    return f"{STAND_IN}{number}{STAND_IN}"


def _refuse_bad_texts(conversation: Conversation) -> None:
    """Raise ConversationError for texts that cannot be encoded: those that hold our own marks, or no valid Unicode."""
    try:
        for text in _list_texts(conversation):
            if MARK in text or STAND_IN in text:
                raise ConversationError("bad-record", "text must not hold the noncharacters U+FDD0 and U+FDD1, got one")
            text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(error.object[error.start]):04X}"
        raise ConversationError("bad-record", f"text must be valid Unicode, got the surrogate {surrogate}") from error
    except RecursionError as error:
        raise ConversationError("bad-record", "record must be nested less deeply, got too many levels") from error


def _list_required(conversation: Conversation) -> Iterator[str]:
    """The texts that a rendered conversation must hold, without the spaces around them, which templates may trim."""
    for message in conversation.messages:
        # The same reasoning is often stored under several names.
        reasons = [message.get(name) for name in REASONING_NAMES]
        values = [message.get("content"), *(said for place, said in enumerate(reasons) if said not in reasons[:place])]
        for call in message.get("tool_calls") or []:
            values += [call["function"]["name"], call["function"]["arguments"]]
        yield from (text.strip() for text in _list_texts(values))
    for tool in conversation.tools or []:
        yield str(tool.get("function", tool).get("name", "")).strip()


def _list_texts(value: Any) -> Iterator[str]:
    """Every text in a conversation: contents, names, arguments of calls, schemas of tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Conversation):
        yield from _list_texts([value.messages, value.tools])
    elif isinstance(value, Mapping):
        yield from itertools.chain(*map(_list_texts, itertools.chain(value.keys(), value.values())))
    elif isinstance(value, list | tuple):
        yield from itertools.chain(*map(_list_texts, value))


def _map_texts(value: Any, change: Any) -> Any:
    """The same with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Conversation):
        return Conversation(_map_texts(value.messages, change), _map_texts(value.tools, change))
    if isinstance(value, Mapping):
        # Keys too, in the arguments of a call; those that templates look up hold no control token.
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value
