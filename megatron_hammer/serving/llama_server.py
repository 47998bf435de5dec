"""llama.cpp's own server as a child of this process: started, watched, and started again after a crash.

It listens on a Unix socket in a private folder; front.py is what clients reach. A request that makes llama.cpp abort
costs the answers that are being written, and not the service.
"""

import asyncio
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_hammer.checkpoint.gguf.header import read_gguf_header
from megatron_hammer.checkpoint.gguf.llama_cpp import COMMAND, select_errors
from megatron_hammer.checkpoint.gguf.llama_cpp_process import LOADING_BYTES, SERVING_BYTES
from megatron_hammer.errors import ConfigError, ConversionError, PlatformError
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.serving.speculative import DraftOptions, build_draft_parameters
from megatron_hammer.training.supervision.launcher.exit_evidence import read_memory_limit_bytes

LARGEST_DEFAULT_CONTEXT = 8192
# HTTP threads beside one per answer: three for /health, /metrics and the page, three for prompts that wait for a slot,
# and one to ask whether llama.cpp still works.
NUM_EXTRA_THREADS = 7
_PROMPT_CACHE_MIB = 512  # prompts of conversations that have no slot now; llama.cpp's default is 8 GiB
_SERVING_BYTES = 3 * GIB  # for requests, and for that cache
_END_TIMEOUT_S = 5.0
_PROBE_INTERVAL_S = 10.0
# llama.cpp answers nobody while it computes a batch of prompts. This is for small models; of large ones, the time that
# a slow machine needs, with as many bytes of weights times tokens in a second.
_LEAST_STUCK_S, _SLOWEST_BYTES_PER_S = 60.0, 2e9
# The second is what a thread is refused with.
_OUT_OF_MEMORY = ("bad_alloc", "system_error", "failed to allocate", "unable to allocate")
_KEPT_LINES = 200
# Types of general.file_type that llama.cpp computes with as they lie in the file. It copies others into another order,
# and then the file itself needs no memory. Source: ggml/src/ggml-cpu/repack.cpp.
_MAPPED_FILE_TYPES = (0, 1, 32)  # f32, f16, bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """name: what clients call the model. context_tokens: of each conversation; None: the model's, at most 8,192.

    num_slots: answers that are computed at the same time. batch_tokens: of prompts, computed in one step.
    chat_template: Jinja text; None: the file's. has_chat: False serves completions only. num_threads: None: llama.cpp's
    choice. draft: a smaller model that proposes tokens.
    """

    path: Path
    name: str
    context_tokens: int | None = None
    num_slots: int = 4
    batch_tokens: int = 2048
    num_threads: int | None = None
    chat_template: str | None = None
    has_chat: bool = True
    api_keys: tuple[str, ...] = ()
    draft: DraftOptions | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


class LlamaServer:
    """One model in llama.cpp; `start` it, then `watch` it until the end, and `close` it."""

    def __init__(self, settings: ServerSettings):
        """Raises HammerError if the file or the settings cannot work, before anything is started."""
        self.settings = settings
        header = read_gguf_header(settings.path)
        trained_tokens = int(header.get(f"{header.get('general.architecture')}.context_length", 0))
        self.context_tokens = settings.context_tokens or min(trained_tokens, LARGEST_DEFAULT_CONTEXT) or 2048
        if settings.has_chat and settings.chat_template is None and "tokenizer.chat_template" not in header:
            raise ConfigError(
                f"{settings.path}: model must have a chat template, got none. "
                "Pass --chat-template FILE, or --no-chat to serve completions of a base model."
            )
        if 0 < trained_tokens < self.context_tokens:
            raise ConfigError(
                f"context: must be at most the {trained_tokens:,} tokens that the model was trained with, "
                f"got {self.context_tokens:,}. Pass a smaller --context."
            )
        self._draft_parameters = {} if settings.draft is None else self._check_draft(settings.draft)
        self._loading_bytes = _find_room(settings.path, header)
        self._folder = tempfile.TemporaryDirectory(prefix="hammer-serve-")
        self.socket_path = Path(self._folder.name) / "llama.sock"
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.is_ready = False
        self.num_restarts = 0

    async def start(self) -> None:
        """Return once the model answers; raises PlatformError or ConversionError if llama.cpp ends before that."""
        self.socket_path.unlink(missing_ok=True)  # of a process that has crashed
        if self._reader is not None:
            await self._reader
            self._lines.clear()
        pipe = asyncio.subprocess.PIPE
        # A session of its own: Ctrl-C in the terminal is for this process, which ends the child when answers are done.
        process = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._reader = asyncio.create_task(self._read_log(process))
        with suppress(ConnectionError):
            process.stdin.write(json.dumps(self._build_parameters()).encode() + b"\n")
            await process.stdin.drain()
        # An empty line means that the process ended before it was ready; the reason is in its log.
        if (await process.stdout.readline()).strip() != b"ready":
            await self._reader
            raise self._describe_failure()
        self.is_ready = True

    async def watch(self) -> None:
        """Start llama.cpp again whenever it ends or is stuck; never returns, raises as `start` does."""
        while True:
            assert self._process is not None
            guard = asyncio.create_task(self._end_when_stuck(self._process))
            try:
                code = await self._process.wait()
            finally:
                guard.cancel()
            self.is_ready = False
            self.num_restarts += 1
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            print(f"note: llama.cpp ended with {cause} and is started again", file=sys.stderr, flush=True)
            await self.start()

    async def _end_when_stuck(self, process: asyncio.subprocess.Process) -> None:
        """Some grammars and JSON schemas take years to be followed, in the one thread that computes for all."""
        settings = self.settings
        batch_s = os.path.getsize(settings.path) * settings.batch_tokens / _SLOWEST_BYTES_PER_S
        while True:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            try:
                async with asyncio.timeout(_LEAST_STUCK_S + batch_s):
                    await self._probe()
            except TimeoutError:
                seconds = f"{_LEAST_STUCK_S + batch_s:,.0f} s"
                print(f"note: llama.cpp has computed nothing for {seconds}", file=sys.stderr, flush=True)
                process.kill()
                return
            except OSError:  # it has ended
                return

    async def _probe(self) -> None:
        """Return once llama.cpp's computing thread has answered a question."""
        reader, writer = await asyncio.open_unix_connection(self.socket_path)
        try:
            key = "".join(f"Authorization: Bearer {key}\r\n" for key in self.settings.api_keys[:1])
            writer.write(f"GET /lora-adapters HTTP/1.0\r\n{key}\r\n".encode())
            await reader.read()
        finally:
            writer.close()

    async def close(self) -> None:
        """End the child: by closing its stdin, or by a signal if it computes on."""
        self.is_ready = False
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), _END_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._reader is not None:
            await self._reader
        self._folder.cleanup()

    def _check_draft(self, draft: DraftOptions) -> dict[str, Any]:
        threads = self.settings.num_threads
        return build_draft_parameters(
            self.settings.path, draft, context_tokens=self.context_tokens, num_threads=threads
        )

    def _build_parameters(self) -> dict[str, Any]:
        settings = self.settings
        threads = {} if settings.num_threads is None else {"cpuparams.n_threads": settings.num_threads}
        template = {} if settings.chat_template is None else {"chat_template": settings.chat_template}
        return {
            "model.path": str(settings.path.resolve()),
            "model_alias": [settings.name],
            "hostnames": [str(self.socket_path)],
            "api_keys": list(settings.api_keys),
            "n_ctx": self.context_tokens * settings.num_slots,
            "n_parallel": settings.num_slots,
            "n_batch": settings.batch_tokens,
            "n_ubatch": min(settings.batch_tokens, 512),
            "n_threads_http": settings.num_slots + NUM_EXTRA_THREADS,
            "use_jinja": True,
            "fit_params": False,  # true would let llama.cpp make the context smaller than asked
            "warmup": False,
            "endpoint_metrics": True,
            "endpoint_slots": False,  # would show the prompts of others
            "cache_ram_mib": _PROMPT_CACHE_MIB,
            "cors_origins": "",  # pages of other sites in a user's browser must not use the model
            "verbosity": 2,  # warnings and errors
            LOADING_BYTES: self._loading_bytes,
            SERVING_BYTES: _SERVING_BYTES,
            **threads,
            **template,
            **self._draft_parameters,
            **settings.more,
        }

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        """Keep the last lines; a pipe that nobody reads would stop the child."""
        assert process.stderr is not None
        while chunk := await process.stderr.read(1 << 16):
            self._lines.extend(chunk.decode(errors="replace").splitlines())

    def _describe_failure(self) -> Exception:
        lines, path = list(self._lines), self.settings.path
        if any(words in line for line in lines for words in _OUT_OF_MEMORY):
            return PlatformError(
                f"{path}: model and context must fit in memory, got {self._loading_bytes / GIB:.1f} GiB for "
                f"{self.settings.num_slots} conversations of {self.context_tokens:,} tokens. "
                "Pass a smaller --context or --parallel."
            )
        return ConversionError(
            f"{path}: llama.cpp must load the model, got: {select_errors(lines)}. "
            "Convert the model again, or copy the file again."
        )


def _find_room(path: Path, header: Mapping[str, Any]) -> int:
    """Bytes that llama.cpp may allocate while it loads; raises PlatformError if the weights alone do not fit."""
    available_bytes = psutil.virtual_memory().available
    if (limit := read_memory_limit_bytes()) is not None:
        available_bytes = min(available_bytes, limit)
    file_bytes = os.path.getsize(path)
    if file_bytes > available_bytes:
        raise PlatformError(
            f"{path}: weights of {file_bytes / GIB:.1f} GiB must fit in memory, got {available_bytes / GIB:.1f} GiB "
            "free. Convert with a smaller --type, such as q4_k_m, or free memory."
        )
    return available_bytes - file_bytes * (header.get("general.file_type") in _MAPPED_FILE_TYPES)
