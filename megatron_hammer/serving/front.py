"""What clients reach: an HTTP server in front of llama.cpp that bounds what each of them can take.

llama.cpp has a thread for each connection, which a silent client holds for an hour, and reads bodies of any size. Here
a connection costs a few kilobytes. A body is read up to a limit, checked (request_limits.py) and only then sent on;
more requests than can be computed wait here; and a client that leaves, or does not read its answer, ends its
computation.
Everything else, such as the API itself, the keys and the web page, is llama.cpp's, passed through unchanged.
"""

import asyncio
import hmac
import logging
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, UnixConnector, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from yarl import URL

from megatron_hammer.serving.llama_server import NUM_EXTRA_THREADS, LlamaServer
from megatron_hammer.serving.request_limits import check_request

MOST_WAITING = 256  # requests that are read and not yet computed
_MOST_BUFFERED_BYTES = 256 << 20  # of all requests together
RETRY_AFTER_S = 2
_BODY_TIMEOUT_S = 60.0
_WRITE_TIMEOUT_S = 60.0  # for one part of an answer that a client does not read
_LAST_PARTS_S = 0.2
_SHUTDOWN_TIMEOUT_S = 5.0  # for answers that are being written
# Of one connection, so not passed on. Content-Length is of a body that may be written anew.
_HOP_HEADERS = frozenset(
    ("connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
# llama.cpp calls these its own errors (500), and clients of OpenAI would send such a request again.
_CLIENTS_ERRORS = re.compile(r"Failed to parse|Unknown |.*is not supported|vector::_M_range_check")
# They, and what lies below them, render a conversation, for which llama.cpp would take ChatML where a model has no
# template.
_CHAT_PATHS = ("/chat/completions", "/apply-template", "/responses", "/messages", "/api/chat")


class _Refusal(Exception):
    """An answer of this server's own: a status of HTTP and a sentence for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Front:
    """The handler of all requests. most_body_bytes: of one request."""

    server: LlamaServer
    most_body_bytes: int
    num_answered: int = 0
    num_refused: int = 0
    num_open: int = 0
    _buffered_bytes: int = 0
    _computing: asyncio.Semaphore = field(init=False)
    _reading: asyncio.Semaphore = field(init=False)
    _session: ClientSession = field(init=False)

    async def open(self) -> web.AppRunner:
        """Must be called in the running loop, which the connections belong to."""
        half = NUM_EXTRA_THREADS // 2
        # Those that compute never take all threads of llama.cpp, so /health and /metrics answer at any load.
        self._computing = asyncio.Semaphore(self.server.settings.num_slots + half)
        self._reading = asyncio.Semaphore(half)
        self._session = ClientSession(
            connector=UnixConnector(str(self.server.socket_path), limit=0, force_close=True),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
        )

        @web.middleware
        async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._handle(request)

        # Not a route: none matches `OPTIONS *`, and the answer would be aiohttp's own.
        application = web.Application(middlewares=[handle])
        # Cancellation ends the request to llama.cpp, and thereby the computation, when a client has left.
        runner = web.AppRunner(
            application,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
            auto_decompress=False,  # some kilobytes could become gigabytes
        )
        logging.getLogger("aiohttp.server").addFilter(_is_no_clients_error)
        await runner.setup()
        return runner

    async def close(self) -> None:
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = bytearray()
        try:
            if request.method != "POST":
                return await self._pass_on(request, None, self._hold(self._reading))
            self._require_permitted(request)
            await self._read_body(request, body)
            return await self._compute(request, body)
        except _Refusal as refusal:
            self.num_refused += 1
            headers = {"Retry-After": str(RETRY_AFTER_S)} if refusal.status == 503 else {}
            content = _describe(refusal.status, str(refusal))
            return web.json_response(content, status=refusal.status, headers=headers)
        finally:
            self._buffered_bytes -= len(body)

    def _require_permitted(self, request: web.Request) -> None:
        if (encoding := request.headers.get("Content-Encoding", "identity")) != "identity":
            raise _Refusal(415, f"body: must not be compressed, got Content-Encoding {encoding}. Send it as it is.")
        keys = self.server.settings.api_keys
        given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("X-Api-Key", "")
        # A list, not a generator: how long `any` takes would tell which key is right in part.
        if keys and not any(
            [hmac.compare_digest(given.encode(errors="surrogateescape"), key.encode()) for key in keys]
        ):
            raise _Refusal(401, "api key: must be one of the server's. Pass it as Authorization: Bearer KEY.")
        path = f"{_address(request).path.removeprefix('/v1')}/"
        if not self.server.settings.has_chat and path.startswith(tuple(f"{chat}/" for chat in _CHAT_PATHS)):
            raise _Refusal(400, "model: it has no chat template, and --no-chat was given. Use /v1/completions.")

    async def _read_body(self, request: web.Request, body: bytearray) -> None:
        """Fill `body`, which counts as memory in use until the request has its answer."""
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for chunk in request.content.iter_any():
                    self._buffered_bytes += len(chunk)
                    body += chunk
                    if len(body) > self.most_body_bytes:
                        raise _Refusal(
                            413,
                            f"body: must be at most {self.most_body_bytes:,} bytes, got more. Send less text: a "
                            f"conversation holds {self.server.context_tokens:,} tokens.",
                        )
                    if self._buffered_bytes > _MOST_BUFFERED_BYTES:
                        raise _Refusal(503, "server: too many large requests are open. Try again later.")
        except web.RequestPayloadError as error:
            raise _Refusal(400, f"body: must be valid HTTP, got: {error}. Check the client.") from None
        except TimeoutError:
            raise _Refusal(408, f"body: must arrive within {_BODY_TIMEOUT_S:.0f} s. Send it again.") from None

    async def _compute(self, request: web.Request, body: bytearray) -> web.StreamResponse:
        try:
            checked = check_request(bytes(body), context_tokens=self.server.context_tokens)
        except ValueError as error:
            raise _Refusal(400, str(error)) from None
        return await self._pass_on(request, checked, self._wait_for_place())

    @asynccontextmanager
    async def _wait_for_place(self) -> AsyncIterator[None]:
        if self.num_open >= MOST_WAITING:
            raise _Refusal(503, f"server: {MOST_WAITING} requests are waiting already. Try again later.")
        self.num_open += 1
        try:
            async with self._hold(self._computing):
                yield
        finally:
            self.num_open -= 1

    @asynccontextmanager
    async def _hold(self, places: asyncio.Semaphore) -> AsyncIterator[None]:
        async with places:
            if not self.server.is_ready:
                raise _Refusal(503, "model: it is being loaded. Try again later.")
            yield

    async def _pass_on(
        self, request: web.Request, body: bytes | None, place: AbstractAsyncContextManager[None]
    ) -> web.StreamResponse:
        """place: at llama.cpp; free once it has answered, however slowly the client reads."""
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_HEADERS]
        answer: web.StreamResponse | None = None
        parts: asyncio.Queue[bytes] = asyncio.Queue()
        writing: asyncio.Task[None] | None = None
        try:
            async with (
                place,
                self._session.request(request.method, _address(request), headers=headers, data=body) as upstream,
            ):
                answer = await _begin_answer(request, upstream)
                writing = asyncio.create_task(self._write(parts, answer))
                async for part in upstream.content.iter_any():
                    self._buffered_bytes += len(part)
                    parts.put_nowait(part)
                    if writing.done() or self._buffered_bytes > _MOST_BUFFERED_BYTES:
                        break
            if self._buffered_bytes > _MOST_BUFFERED_BYTES:
                raise TimeoutError  # too many clients do not read
            parts.put_nowait(b"")
            await writing
        except (ClientError, TimeoutError) as error:
            if answer is None:
                raise _Refusal(502, f"llama.cpp: it ended while it answered ({error}). Try again later.") from None
            await self._break_off(request, answer, writing)
            return answer
        finally:
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
            while not parts.empty():
                self._buffered_bytes -= len(parts.get_nowait())
        self.num_answered += 1
        return answer

    async def _write(self, parts: asyncio.Queue[bytes], answer: web.StreamResponse) -> None:
        """Write the parts up to an empty one, as the client reads them."""
        while part := await parts.get():
            self._buffered_bytes -= len(part)
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await answer.write(part)
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await answer.write_eof()

    async def _break_off(
        self, request: web.Request, answer: web.StreamResponse, writing: asyncio.Task[None] | None
    ) -> None:
        """Tell the client that the answer is incomplete: by an event, where it reads events, and by the connection."""
        self.num_refused += 1
        if writing is not None:
            await asyncio.wait((writing,), timeout=_LAST_PARTS_S)  # for what is still to be written before the event
        with suppress(ConnectionError, TimeoutError):
            if answer.content_type == "text/event-stream":
                error = _describe(502, "llama.cpp: it ended while it answered. Try again later.")
                async with asyncio.timeout(1.0):
                    await answer.write(b"data: " + orjson.dumps(error) + b"\n\n")
        if request.transport is not None:
            request.transport.abort()


async def _begin_answer(request: web.Request, upstream: ClientResponse) -> web.StreamResponse:
    """The head of an answer, sent; raises _Refusal for an error that is not in the form of OpenAI's."""
    is_json = upstream.content_type == "application/json"
    if upstream.status == HTTPStatus.INTERNAL_SERVER_ERROR or (upstream.status >= 400 and not is_json):
        raise _read_error(upstream.status, await upstream.read())
    answer = web.StreamResponse(status=upstream.status)
    for name, value in upstream.headers.items():
        if name.lower() not in _HOP_HEADERS:
            answer.headers.add(name, value)
    await answer.prepare(request)
    return answer


def _address(request: web.Request) -> URL:
    """Where llama.cpp gets the request: without `.` and `..`, so what is checked is what is asked."""
    if not request.raw_path.startswith("/"):
        raise _Refusal(400, f"path: must begin with a slash, got {request.raw_path[:60]}. Check the client.")
    return URL(f"http://localhost{request.raw_path}")


def _read_error(status: int, content: bytes) -> _Refusal:
    """An error of llama.cpp, with the status of whose fault it is. Some have a text alone, or nothing."""
    try:
        message = str(orjson.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = content.decode(errors="replace") or f"llama.cpp: it answered with status {status} alone."
    return _Refusal(400 if status >= 500 and _CLIENTS_ERRORS.match(message) else status, message)


def _is_no_clients_error(record: logging.LogRecord) -> bool:
    """Whether aiohttp should log it: a request that is no HTTP has its answer, and is no defect of this server."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


def _describe(status: int, message: str) -> dict[str, Any]:
    """An error in the form of OpenAI's, which its clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


async def serve(
    server: LlamaServer, listener: socket.socket, *, most_body_bytes: int, on_ready: Callable[[], None]
) -> Front:
    """Serve on a socket that is bound until SIGINT or SIGTERM; the Front says how much was answered.

    Raises HammerError if llama.cpp does not load the model, also after a crash.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Each connection is a file; the usual limit of 1,024 is for programs that call select().
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    front = Front(server, most_body_bytes)
    runner = await front.open()
    try:
        if not await _race(stop, server.start()):
            # Before this, clients wait in the queue of the socket.
            await web.SockSite(runner, listener).start()
            on_ready()
            await _race(stop, server.watch())
        if front.num_open:
            text = f"stopping: {front.num_open} open answers have {_SHUTDOWN_TIMEOUT_S:.0f} s"
            print(text, file=sys.stderr, flush=True)
    finally:
        await runner.cleanup()
        await front.close()
        await server.close()
    return front


async def _race(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run until `work` is done or a signal has come, and return whether it has; raises what `work` raises."""
    task, signalled = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for each in (task, signalled):
            each.cancel()
        await asyncio.gather(task, signalled, return_exceptions=True)
    return stop.is_set()
