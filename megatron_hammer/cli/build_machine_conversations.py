"""Make small conversations, preference pairs and held-out questions for demonstrations; nothing is downloaded.

They greet, add small numbers, repeat words and tell kinds of files apart: enough for a chat model of a few million
parameters. DIR gets conversations.jsonl, preferences.jsonl and held_out.jsonl.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.corpus.machine_conversations import build_machine_conversations
from megatron_hammer.errors import exit_on_user_error
from megatron_hammer.files.command_line import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the three files")
    parser.add_argument("--num-conversations", type=int, default=8000, help="conversations to write (%(default)s)")
    parser.add_argument("--num-preferences", type=int, default=1000, help="preference pairs to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="random seed (%(default)s)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Prints what was written."""
    arguments = parse_arguments(argv)
    written = build_machine_conversations(
        arguments.output_dir,
        num_conversations=arguments.num_conversations,
        num_preferences=arguments.num_preferences,
        seed=arguments.seed,
    )
    print(
        f"{arguments.output_dir}: {written.num_conversations:,} conversations, {written.num_preferences:,} preference "
        f"pairs, {written.num_held_out:,} held-out questions"
    )
