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
from megatron_hammer.files.read import read_text
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
    parser.add_argument("--chat-template", type=Path, help="a Jinja file to ship with the tokenizer")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints what was compared; status goes to stderr."""
    arguments = parse_arguments(argv)
    started_at_s = time.monotonic()
    chat_template = read_text(arguments.chat_template) if arguments.chat_template else None
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
            chat_template=chat_template,
            on_document=lambda num_documents: status.update(f"{num_documents:,} documents compared"),
        )
    if exported.tokenizer.note is not None:
        print(f"note: {exported.tokenizer.note}", file=sys.stderr)
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
    return f"{save_dir}: {exported.tokenizer.vocab_size:,} ids; {compared} encode and decode alike in transformers"
