"""Write a Llama-family model as one GGUF file for llama.cpp, and verify it with llama.cpp itself.

Reads a Hugging Face folder or a Megatron checkpoint, and includes the tokenizer. Before the file is renamed into place,
every tensor is read back and llama.cpp (pip install xllamacpp) loads the file. Its tokens for sample texts and --corpus
are compared with the tokenizer's, and its greedy continuations with those of transformers.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hammer.checkpoint.verification.print_checks import print_checks
from megatron_hammer.errors import PlatformError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name
from megatron_hammer.files.progress import show_stages

if TYPE_CHECKING:
    from megatron_hammer.checkpoint.gguf.to_gguf import GgufReport


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    # Imported here, since it imports the optional package gguf.
    from megatron_hammer.checkpoint.gguf.file_types import FILE_TYPES

    parser = CommandParser(__doc__)
    parser.add_argument(
        "--load", type=Path, required=True, help="Hugging Face folder, or directory that training saved into"
    )
    parser.add_argument("--save", type=parse_new_name, required=True, help="GGUF file to write")
    parser.add_argument(
        "--type",
        choices=list(FILE_TYPES),
        default="f16",
        help="type of the weights; vectors are always f32 (%(default)s)",
    )
    parser.add_argument("--iteration", type=int, help="of a Megatron checkpoint (default: the latest)")
    parser.add_argument(
        "--tokenizer-model", type=Path, help="for a Megatron checkpoint (default: the one it was trained with)"
    )
    parser.add_argument("--name", help="name that llama.cpp shows (default: the folder's)")
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        help="documents that both tokenizers must encode identically: files or folders",
    )
    parser.add_argument(
        "--json-keys", default="text", metavar="KEY", help="field of --corpus that holds the text (%(default)s)"
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not run llama.cpp or compare logits; tensors are still read back",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file in --save")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    arguments = parser.parse_args(argv)
    parser.refuse_idle(argv, {"json_keys": "corpus"})
    if arguments.no_verify and arguments.corpus:
        parser.error("--corpus is compared with llama.cpp, got --no-verify too")
    return arguments


@exit_on_interrupt("nothing was written")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Raises PlatformError if the package gguf is not installed."""
    # First: parse_arguments imports the file types, which need the package.
    require_gguf()
    arguments = parse_arguments(argv)

    from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
    from megatron_hammer.post_training.templates.chat_export import find_chat_format

    options = GgufOptions(
        load_dir=arguments.load,
        save_path=arguments.save,
        file_type=arguments.type,
        iteration=arguments.iteration,
        tokenizer_path=arguments.tokenizer_model,
        name=arguments.name,
        is_verified=not arguments.no_verify,
        corpus=tuple(arguments.corpus),
        text_key=arguments.json_keys,
        find_chat=functools.partial(find_chat_format, source=None, bindings=()),
        overwrite=arguments.overwrite,
    )
    with show_stages() as show:
        report = export_to_gguf(options, show)
    if arguments.json:
        # ensure_ascii=False: the examples may be Chinese text. default=str is for the paths.
        print(json.dumps(dataclasses.asdict(report), default=str, ensure_ascii=False))
        return
    # With --json the notes are a field of the report.
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print_checks(report.checks)
    for example in report.examples:
        print(f"example: {example}")
    print(summarise(report))


def require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise PlatformError("gguf: must be installed, got none. Run pip install gguf xllamacpp.")


def summarise(report: "GgufReport") -> str:
    # Vectors are always f32, so a file of one type still holds two types of tensors.
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    return (
        f"{report.save_path}: {report.arch} in {report.file_type}, {report.num_parameters:,} parameters; "
        f"{report.num_tensors} tensors ({types}), 0 dropped; {report.file_bytes:,} bytes; {report.elapsed_s:.1f} s"
    )
