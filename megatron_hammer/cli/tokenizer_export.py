"""Export a tokenizer as a Hugging Face folder that encodes identically, verified with transformers first.

hammer tokenizer export --tokenizer-model tokenizer.model --save hf/tokenizer --input corpus/
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from megatron_hammer.corpus.input_files import find_input_files, match_partials
from megatron_hammer.corpus.readers import Document, read_files
from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.post_training.templates.chat_export import build_chat_format
from megatron_hammer.post_training.templates.chat_template import SHIPPED, load_chat_template, parse_bindings
from megatron_hammer.tokenizer.export.export_tokenizer import (
    ExportedFolder,
    export_tokenizer_folder,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--tokenizer-model", type=Path, required=True, help="a SentencePiece BPE .model, or a HF folder"
    )
    parser.add_argument("--save", type=Path, required=True, help="folder to create; it must be absent or empty")
    parser.add_argument("--input", nargs="+", default=[], help="documents to compare on: files, globs or directories")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="field that holds the text (%(default)s)")
    parser.add_argument(
        "--model-max-length", type=int, help="positions of the model, for transformers (default: no limit)"
    )
    add_chat_flags(parser, default="none")
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, {"json_keys": "input"})
    if arguments.bind_token and not arguments.chat_template:
        parser.error("--bind-token must come with --chat-template, got it alone")
    return arguments


def add_chat_flags(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """The flags that say which chat template is used; default: in words, for the help; None requires the flag."""
    parser.add_argument(
        "--chat-template",
        required=default is None,
        help=f"{', '.join(SHIPPED)}, or a Jinja file with {{%% generation %%}} marks"
        + (f" (default: {default})" if default else ""),
    )
    parser.add_argument(
        "--bind-token",
        action="append",
        default=[],
        metavar="TOKEN=OTHER",
        help="write a control token of the template as another one, which the tokenizer has and no text uses",
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints what was compared; status goes to stderr."""
    arguments = parse_arguments(argv)
    started_at_s = time.monotonic()
    chat = None
    if arguments.chat_template:
        template = load_chat_template(arguments.chat_template, parse_bindings(arguments.bind_token), is_marked=False)
        chat = build_chat_format(arguments.tokenizer_model, template)
    # Without --input, only the sample texts are compared.
    documents: Iterable[Document] = ()
    if arguments.input:
        # Now, so that a wrong path is reported before the sample texts are compared, and the export is no input.
        files = find_input_files(arguments.input, match_partials(arguments.save)).files
        documents = read_files(files, arguments.json_keys)
    console = Console(stderr=True)
    with console.status("comparing sample texts") as status:
        exported = export_tokenizer_folder(
            arguments.tokenizer_model,
            arguments.save,
            documents,
            max_length=arguments.model_max_length,
            chat=chat,
            on_document=lambda num_documents: status.update(f"{num_documents:,} documents compared"),
        )
    for note in (*((exported.tokenizer.note,) if exported.tokenizer.note else ()), *exported.notes):
        print(f"note: {note}", file=sys.stderr)
    if chat is not None and not exported.num_conversations:
        print("note: no conversation was compared: the template has no {% generation %} marks", file=sys.stderr)
    print(f"{summarise(arguments.save, exported)}; {time.monotonic() - started_at_s:.1f} s")


def summarise(save_dir: Path, exported: ExportedFolder) -> str:
    """The last line: the number of ids, and the texts that were compared."""
    corpus = exported.corpus
    compared = f"{exported.samples.num_documents:,} sample texts"
    # Without a corpus the last line says so: sample texts alone are a weak proof.
    if corpus.num_documents:
        size = f"{corpus.text_bytes / 1e6:,.2f} MB, {corpus.num_tokens:,} tokens"
        compared += f" and {corpus.num_documents:,} documents ({size})"
    else:
        compared += " and no documents (pass --input)"
    same = f"{compared} encode and decode alike in transformers"
    if exported.num_conversations:
        same += f", {exported.num_conversations} conversations have the same ids and masks"
    return f"{save_dir}: {exported.tokenizer.vocab_size:,} ids; {same}"
