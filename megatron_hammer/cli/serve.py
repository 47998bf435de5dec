"""Serve a model to OpenAI's clients and to a web browser, with llama.cpp or vLLM.

  python tools/serve.py --model checkpoints/hammer --cache-dir cache

--model is a checkpoint, a Hugging Face folder or a GGUF file; the first two are converted, once per --cache-dir.
Then http://127.0.0.1:8080 is a page to chat on, and http://127.0.0.1:8080/v1 is what OpenAI's clients take as base_url.
Ctrl-C or SIGTERM ends it.
"""

import argparse
import asyncio
import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_hammer.errors import ConfigError, PlatformError, exit_on_interrupt, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.progress import show_stages
from megatron_hammer.files.read import read_text
from megatron_hammer.serving.model_files import ModelSource, open_gguf, open_hugging_face
from megatron_hammer.serving.speculative import DEFAULT_DRAFT_TOKENS, DraftOptions
from megatron_hammer.serving.vllm import build_vllm_command, build_vllm_environment, require_vllm

_BYTES_PER_TOKEN = 64  # in JSON; text of most languages has less than 8
_SMALLEST_LIMIT_BYTES = 1 << 20


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    add_model_flags(parser, is_required=True)
    parser.add_argument("--engine", choices=["llama.cpp", "vllm"], default="llama.cpp", help="%(default)s or vLLM")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0 for any free one (%(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: that of the folder or file)")
    parser.add_argument("--api-key-file", type=Path, help="file of keys, one per line; clients must send one of them")
    parser.add_argument("--parallel", type=int, default=4, help="answers computed at the same time (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="of prompts, computed in one step (default: 2048)")
    parser.add_argument("--no-chat", action="store_true", help="serve completions only, as of a base model")
    parser.add_argument(
        "--max-request-mib", type=float, help="largest request (default: 1, or more for a context above 16,384)"
    )
    return parser.parse_args(argv)


def add_model_flags(parser: argparse.ArgumentParser, *, is_required: bool) -> None:
    """The flags that say which model is loaded, and how."""
    parser.add_argument("--model", type=Path, required=is_required, help="checkpoint, Hugging Face folder or GGUF file")
    parser.add_argument("--iteration", type=int, help="of a checkpoint (default: the latest)")
    parser.add_argument("--tokenizer-model", type=Path, help="of a checkpoint (default: the one it was trained with)")
    parser.add_argument("--type", help="type of the converted weights, as of hammer convert to-gguf (f16)")
    parser.add_argument("--cache-dir", type=Path, help="folder for converted models (default: one until the end)")
    parser.add_argument("--no-verify", action="store_true", help="convert without comparing both models")
    parser.add_argument(
        "--chat-template", help="chatml, llama3, qwen, tiny_llm_zh or a Jinja file (default: the model's own)"
    )
    parser.add_argument("--context", type=int, help="tokens of a conversation (default: the model's, at most 8192)")
    parser.add_argument(
        "--draft-model", type=Path, help="smaller model with the same tokenizer that proposes tokens, as of --model"
    )
    parser.add_argument("--draft-tokens", type=int, help="tokens that it proposes at a time (default: 4)")
    parser.add_argument("--threads", type=int, help="threads that compute (default: llama.cpp's choice)")


@exit_on_interrupt("no server was started")
@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help."""
    arguments = parse_arguments(argv)
    validate(arguments)
    keys = read_keys(arguments.api_key_file)
    source = build_source(arguments)
    if arguments.engine == "vllm":
        serve_with_vllm(arguments, source, keys)
        return
    require_llama_cpp()
    listener = listen(arguments.host, arguments.port)  # before the conversion: a port in use is said at once
    with listener, ExitStack() as stack:
        # Only around the conversions: a live line in a terminal takes what is printed to stdout.
        with show_stages() as show:
            path = stack.enter_context(open_gguf(source, arguments.cache_dir, show))
            draft = stack.enter_context(open_draft(arguments, show))
        serve_with_llama_cpp(arguments, path, draft, arguments.name or source.name, keys, listener)


def validate(arguments: argparse.Namespace) -> None:
    """Raise ConfigError with every problem of the values."""
    limits = {
        "parallel": (1, 256),  # LLAMA_MAX_SEQ of llama.cpp
        "batch_tokens": (1, None),
        "context": (16, None),
        "threads": (1, None),
        "draft_tokens": (1, 64),
        "max_request_mib": (0.01, 1024),
        "port": (0, 65535),
    }
    problems = [
        f"{name.replace('_', '-')}: must be {f'at least {least}' if most is None else f'between {least} and {most}'}, "
        f"got {value}."
        for name, (least, most) in limits.items()
        if (value := getattr(arguments, name, None)) is not None and not least <= value <= (most or value)
    ]
    if not arguments.model.exists():
        problems.append(f"{arguments.model}: model does not exist. Pass a checkpoint, a folder or a GGUF file.")
    if getattr(arguments, "no_chat", False) and arguments.chat_template is not None:
        problems.append(f"chat-template: has no effect with --no-chat, got {arguments.chat_template}. Leave one out.")
    if arguments.draft_model is None and arguments.draft_tokens is not None:
        problems.append(f"draft-tokens: must come with --draft-model, got {arguments.draft_tokens} alone.")
    if arguments.draft_model is not None and not arguments.draft_model.exists():
        problems.append(f"{arguments.draft_model}: model does not exist. Pass a checkpoint, a folder or a GGUF file.")
    if problems:
        raise ConfigError(*problems)


def build_source(arguments: argparse.Namespace) -> ModelSource:
    return ModelSource(
        path=arguments.model,
        file_type=arguments.type,
        iteration=arguments.iteration,
        tokenizer_path=arguments.tokenizer_model,
        chat_template=arguments.chat_template,
        is_verified=not arguments.no_verify,
    )


@contextmanager
def open_draft(
    arguments: argparse.Namespace, show: Callable[[str, int, int | None], None]
) -> Iterator[DraftOptions | None]:
    """The GGUF file of --draft-model and how many tokens it proposes, if it is given; converted as --model is."""
    if arguments.draft_model is None:
        yield None
        return
    source = ModelSource(path=arguments.draft_model, is_verified=not arguments.no_verify)
    # --type is of the files that are made here.
    source = source if source.is_gguf else replace(source, file_type=arguments.type)
    with open_gguf(source, arguments.cache_dir, show) as path:
        yield DraftOptions(path=path, num_tokens=arguments.draft_tokens or DEFAULT_DRAFT_TOKENS)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Raises ConfigError for a file without keys, which would let everybody in."""
    if path is None:
        return ()
    keys = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not keys or not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigError(f"{path}: must hold keys of ASCII characters, one per line, got {len(keys)} keys.")
    return keys


def require_llama_cpp() -> None:
    for package in ("xllamacpp", "gguf", "aiohttp"):
        if importlib.util.find_spec(package) is None:
            raise PlatformError(f"{package}: must be installed, got none. Run pip install megatron_hammer[serving].")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that no other server gets the port meanwhile; raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"port: must be free at host {host}, got {port} ({reason}). Pass another --port, or 0 for any free one."
        ) from error


def read_template(source: str | None) -> str | None:
    """The text of a shipped template or of a file."""
    if source is None:
        return None
    from megatron_hammer.post_training.templates.chat_template import load_chat_template

    return load_chat_template(source, is_marked=False).text


def serve_with_llama_cpp(
    arguments: argparse.Namespace,
    path: Path,
    draft: DraftOptions | None,
    name: str,
    keys: tuple[str, ...],
    listener: socket.socket,
) -> None:
    # Imported here, so that --help and wrong flags need no package of the extra.
    from megatron_hammer.serving.front import serve
    from megatron_hammer.serving.llama_server import LlamaServer, ServerSettings

    settings = ServerSettings(
        path=path,
        name=name,
        context_tokens=arguments.context,
        num_slots=arguments.parallel,
        batch_tokens=arguments.batch_tokens or 2048,
        num_threads=arguments.threads,
        chat_template=read_template(arguments.chat_template),
        has_chat=not arguments.no_chat,
        api_keys=keys,
        draft=draft,
    )
    server = LlamaServer(settings)
    most_bytes = max(_SMALLEST_LIMIT_BYTES, _BYTES_PER_TOKEN * server.context_tokens)
    if arguments.max_request_mib is not None:
        most_bytes = int(arguments.max_request_mib * (1 << 20))

    def announce() -> None:
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(
            f"serving {name} at {address} (page) and {address}/v1 (OpenAI API): {arguments.parallel} answers at a "
            f"time, {server.context_tokens:,} tokens each, requests up to {most_bytes:,} bytes",
            flush=True,
        )
        if not keys and not is_loopback(host):
            print("note: whoever reaches this address can use the model; see --api-key-file", file=sys.stderr)

    front = asyncio.run(serve(server, listener, most_body_bytes=most_bytes, on_ready=announce))
    print(
        f"stopped: {front.num_answered:,} requests answered by llama.cpp, {front.num_refused:,} refused or broken off, "
        f"{server.num_restarts} restarts"
    )


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.split("%")[0]).is_loopback


def serve_with_vllm(arguments: argparse.Namespace, source: ModelSource, keys: tuple[str, ...]) -> None:
    """Replaced by vLLM's process; of a checkpoint the exported folder must stay, so it needs --cache-dir."""
    useless = {
        "--no-chat": arguments.no_chat,
        "--threads": arguments.threads,
        "--max-request-mib": arguments.max_request_mib,
        "--draft-model": arguments.draft_model,
    }
    problems = [f"engine: vllm has no {flag}. Leave it out." for flag, value in useless.items() if value]
    if len(keys) > 1:
        problems.append(f"{arguments.api_key_file}: vllm takes one key, got {len(keys)}. Leave one line.")
    if source.is_gguf:
        problems.append(
            f"{source.path}: --engine vllm needs a Hugging Face folder or a checkpoint, got a file. "
            "Leave --engine out to serve a GGUF file."
        )
    elif arguments.cache_dir is None and not source.is_hugging_face:
        problems.append(
            "cache-dir: must be given to serve a checkpoint with vllm. Pass a folder for the exported model."
        )
    if problems:
        raise ConfigError(*problems)
    require_vllm()
    listen(arguments.host, arguments.port).close()
    with show_stages() as show, open_hugging_face(source, arguments.cache_dir, show) as folder:
        command = build_vllm_command(
            folder,
            name=arguments.name or source.name,
            host=arguments.host,
            port=arguments.port,
            context_tokens=arguments.context,
            num_slots=arguments.parallel,
            batch_tokens=arguments.batch_tokens,
            chat_template=find_template_file(arguments.chat_template),
        )
    sys.stdout.flush()
    os.execve(command[0], command, build_vllm_environment(os.environ, keys))


def find_template_file(source: str | None) -> Path | None:
    """What vLLM is given; raises ConfigError if there is no such template."""
    if source is None:
        return None
    from megatron_hammer.post_training.templates.chat_template import find_chat_template, load_chat_template

    load_chat_template(source, is_marked=False)
    return find_chat_template(source)
