"""Print conversations token by token, with the weight of each token in the loss: look before you train.

hammer show-chat-masks --input chat.jsonl --tokenizer-model tokenizer.model --chat-template chatml
hammer show-chat-masks --data-path data/chat --tokenizer-model tokenizer.model

The first form encodes records, and refuses a template that a model cannot be trained with; the second shows what
preprocess-conversations has written. The weight belongs to the token itself, as the one to be predicted.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from megatron_hammer.cli.preprocess_conversations import add_record_flags, add_template_flags
from megatron_hammer.data.conversations.formats import ConversationError, read_conversation
from megatron_hammer.data.conversations.pair import open_conversations
from megatron_hammer.data.conversations.records import iterate_records
from megatron_hammer.data.inspect.document_text import require_same_tokenizer
from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.tables import build_table, open_console, print_json
from megatron_hammer.post_training.templates.chat_template import ChatTemplate, load_chat_template, parse_bindings
from megatron_hammer.post_training.templates.chat_tokenizer import ChatTokenizer
from megatron_hammer.post_training.templates.proof import prove_template

LEARNED_STYLE = "bold green"


@dataclass(frozen=True, slots=True)
class ShownConversation:
    """source: file:line, or the number in stored data. ids and mask [n]; problem: why a record cannot be used."""

    source: str
    ids: np.ndarray
    mask: np.ndarray
    problem: str | None = None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help. Raises ConfigError for flags of one form in the other."""
    parser = CommandParser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="records: files, globs or directories")
    source.add_argument("--data-path", type=Path, metavar="PREFIX", help="what preprocess-conversations has written")
    add_template_flags(parser, is_required=False)
    add_record_flags(parser)
    parser.add_argument("--first", type=int, default=0, help="number of the first conversation to show (%(default)s)")
    parser.add_argument("--count", type=int, default=3, help="conversations to show (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.first < 0 or arguments.count < 1:
        parser.error(f"--first and --count must be above, got first={arguments.first}, count={arguments.count}")
    if arguments.input and not arguments.chat_template:
        parser.error("--input needs --chat-template")
    given = {"--chat-template": arguments.chat_template, "--bind-token": arguments.bind_token}
    given |= {"--system": arguments.system, "--format": arguments.format != "auto"}
    if arguments.data_path and (unused := [flag for flag, value in given.items() if value]):
        parser.error(f"--data-path must come without {unused[0]}: the data know their template")
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Records that cannot be used are shown with the reason."""
    arguments = parse_arguments(argv)
    if arguments.data_path:
        tokenizer, conversations = open_stored(arguments.data_path, arguments.tokenizer_model)
    else:
        template = load_chat_template(arguments.chat_template, parse_bindings(arguments.bind_token))
        tokenizer = ChatTokenizer(arguments.tokenizer_model, template)
        prove_template(tokenizer)
        conversations = encode_records(arguments, tokenizer)
    shown = list(itertools.islice(conversations, arguments.first, arguments.first + arguments.count))
    if not shown:
        raise ConfigError(f"first: must be the number of a conversation, got {arguments.first}, which none has.")
    if arguments.json:
        print_json({"conversations": [describe(tokenizer, conversation) for conversation in shown]})
        return
    for conversation in shown:
        print_tokens(tokenizer, conversation)


def open_stored(prefix: Path, tokenizer_path: Path) -> tuple[ChatTokenizer, Iterator[ShownConversation]]:
    """Raises DataError if another tokenizer encoded the data."""
    stored = open_conversations(prefix)
    identity = stored.manifest.template
    tokenizer = ChatTokenizer(tokenizer_path, ChatTemplate(identity.name, identity.text, identity.bound_tokens))
    require_same_tokenizer(prefix, tokenizer.encoder, stored.manifest)
    ends = stored.read_offsets()
    return tokenizer, (
        ShownConversation(f"{prefix}: conversation {number}", *stored.select(ends[number], ends[number + 1]))
        for number in range(len(stored))
    )


def encode_records(arguments: argparse.Namespace, tokenizer: ChatTokenizer) -> Iterator[ShownConversation]:
    nothing = np.empty(0, dtype=np.int32)
    for source, read in iterate_records(arguments.input):
        try:
            encoded = tokenizer.encode(read_conversation(read(), arguments.format, system=arguments.system))
        except ConversationError as error:
            yield ShownConversation(source, nothing, nothing, f"{error.reason}: {error}")
        else:
            yield ShownConversation(source, encoded.ids, encoded.mask)


def describe(tokenizer: ChatTokenizer, conversation: ShownConversation) -> dict[str, Any]:
    """A conversation for --json."""
    if conversation.problem is not None:
        return {"source": conversation.source, "problem": conversation.problem}
    controls = set(tokenizer.controls.values())
    return {
        "source": conversation.source,
        "num_tokens": len(conversation.ids),
        "num_learned_tokens": int(conversation.mask.sum()),
        "tokens": [
            {"id": number, "text": tokenizer.spell(number), "weight": weight, "is_control": number in controls}
            for number, weight in zip(conversation.ids.tolist(), conversation.mask.tolist(), strict=True)
        ],
    }


def print_tokens(tokenizer: ChatTokenizer, conversation: ShownConversation) -> None:
    """A row for each token; those that are learned stand out on a terminal."""
    console = open_console()
    if conversation.problem is not None:
        console.print(Text(f"{conversation.source}: not used. {conversation.problem}"))
        return
    described = describe(tokenizer, conversation)
    counts = f"{described['num_tokens']:,} tokens, {described['num_learned_tokens']:,} of them learned"
    console.print(Text(f"{conversation.source}: {counts}", "bold"))
    rows = [
        (
            json.dumps(token["text"], ensure_ascii=False),
            "control" if token["is_control"] else "",
            str(token["id"]),
            str(token["weight"]),
        )
        for token in described["tokens"]
    ]
    table = build_table(None, ("token", "", "id", "weight"), rows, num_text=2)
    for row, token in zip(table.rows, described["tokens"], strict=True):
        row.style = LEARNED_STYLE if token["weight"] else None
    console.print(table)
