#!/usr/bin/env python3
"""Train a SentencePiece BPE tokenizer with HammerLLM's parameters, on the inputs that preprocess_data.py reads."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.tokenizer.train import (
    TokenizerRecipe,
    read_required_chars,
    read_user_defined_symbols,
    train_tokenizer,
)


def parse_arguments() -> argparse.Namespace:
    default = TokenizerRecipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or directories")
    parser.add_argument("--output", type=Path, required=True, help="the .model to write")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="field that holds the text (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=default.vocab_size, help="number of pieces (%(default)s)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=default.character_coverage,
        help="share of the text's characters that get a piece of their own; the rest become bytes (%(default)s)",
    )
    parser.add_argument("--required-chars-file", type=Path, help="every character in this file gets a piece")
    parser.add_argument("--user-defined-symbols-file", type=Path, help="every line of this file becomes one piece")
    parser.add_argument("--max-bytes", type=int, help="train on a random sample of this much text (all of it)")
    parser.add_argument("--seed", type=int, default=1234, help="decides the sample (%(default)s)")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    arguments = parse_arguments()
    started_at_s = time.monotonic()
    chars_path, symbols_path = arguments.required_chars_file, arguments.user_defined_symbols_file
    recipe = TokenizerRecipe(
        vocab_size=arguments.vocab_size,
        character_coverage=arguments.character_coverage,
        required_chars=read_required_chars(chars_path) if chars_path else "",
        user_defined_symbols=read_user_defined_symbols(symbols_path) if symbols_path else (),
    )
    with Console(stderr=True).status("training the tokenizer"):
        trained = train_tokenizer(
            arguments.input,
            arguments.output,
            recipe,
            json_key=arguments.json_keys,
            max_bytes=arguments.max_bytes,
            seed=arguments.seed,
        )
    print(
        f"{trained.path}: {trained.vocab_size} pieces from {trained.num_sampled_lines} lines, "
        f"{trained.sampled_bytes / 1e6:.2f} of {trained.text_bytes / 1e6:.2f} MB in {trained.num_documents} documents, "
        f"{time.monotonic() - started_at_s:.1f} s"
    )


if __name__ == "__main__":
    main()
