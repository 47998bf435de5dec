"""Talk with a model in the terminal: with a running server, or with a model that is loaded for the conversation.

  python tools/chat.py --server http://127.0.0.1:8080
  python tools/chat.py --model checkpoints/hammer --system "Answer in one sentence."

Ctrl-C stops an answer; /reset, /save FILE, /exit and /help are commands. From a pipe, every line is one turn.
"""

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_hammer.cli.serve import add_model_flags, read_keys, validate
from megatron_hammer.errors import INTERRUPTED_EXIT_CODE, ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_path
from megatron_hammer.platforms.parent_process import end_with_parent
from megatron_hammer.serving.chat_client import ChatClient
from megatron_hammer.serving.terminal_chat import TerminalChat

_END_TIMEOUT_S = 10.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument("--server", help="URL of a running server, in place of --model")
    parser.add_argument("--api-key-file", type=parse_path, help="file with the server's key in its first line")
    add_model_flags(parser, is_required=False)
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0 for the likeliest tokens (default: the server's)")
    parser.add_argument("--top-p", type=float, help="choose among tokens of this probability (default: the server's)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: until the context is full)")
    parser.add_argument("--seed", type=int, help="random seed (default: another one each time)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help."""
    arguments = parse_arguments(argv)
    model_flags = list_model_flags(arguments)
    if (arguments.server is None) == (arguments.model is None):
        raise ConfigError("server: must be given, or --model, and not both. Pass one of them.")
    if arguments.server is not None and model_flags:
        raise ConfigError(f"{model_flags[0]}: is of a model that is loaded, got --server. Leave it out.")
    if arguments.model is not None and arguments.api_key_file is not None:
        raise ConfigError(
            f"api-key-file: is of a running server, got {arguments.api_key_file} without one. Leave it out."
        )
    # So that `finally` and `with` run, which end the server of a model and remove its files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if arguments.server is not None:
            keys = read_keys(arguments.api_key_file)
            talk(arguments, arguments.server, keys[0] if keys else None)
            return
        validate(arguments)
        with start_server(["--model", str(arguments.model), *model_flags]) as (url, key):
            talk(arguments, url, key)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)


def list_model_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags of a loaded model, --model apart, as words for the command serve."""
    names = (
        *("iteration", "tokenizer_model", "type", "cache_dir", "chat_template", "context", "threads"),
        *("draft_model", "draft_tokens"),
    )
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}
    words = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    return words + ["--no-verify"] * arguments.no_verify


def talk(arguments: argparse.Namespace, url: str, key: str | None) -> None:
    names = ("temperature", "top_p", "max_tokens", "seed")
    options: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    client = ChatClient(url, api_key=key, options=options)
    chat = TerminalChat(client, client.find_model(), arguments.system)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # editing and history of input()

        chat.run_terminal(lambda: input("> "))
    else:
        chat.run_pipe(sys.stdin.buffer)


@contextmanager
def start_server(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Serve a model on a free port for this conversation alone; yield its URL and key. Exits as the server does."""
    parent, key = os.getpid(), secrets.token_urlsafe()
    with tempfile.NamedTemporaryFile("w", prefix="hammer-chat-") as key_file:
        key_file.write(key)
        key_file.flush()
        command = [sys.executable, "-m", "megatron_hammer", "serve", *flags, "--port", "0", "--parallel", "1"]
        # A session of its own: Ctrl-C stops an answer, and not the server.
        process = subprocess.Popen(
            [*command, "--api-key-file", key_file.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(parent),
        )
        try:
            assert process.stdout is not None
            if found := re.search(r" and (http://\S+)/v1 ", process.stdout.readline()):
                yield found[1], key
            else:
                sys.exit(process.wait())  # it has said why
        finally:
            process.terminate()
            try:
                process.communicate(timeout=_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
