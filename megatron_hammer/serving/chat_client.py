"""Streams the answers of an OpenAI-compatible server; no package beside the standard library."""

import http.client
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from megatron_hammer.errors import ConfigError, PlatformError

_SURROGATE = re.compile("[\ud800-\udfff]")
_TIMEOUT_S = 600.0  # until the first token: a long prompt on a busy server


class ChatClient:
    """url: of the server, with or without /v1. options: fields of every request, such as temperature."""

    def __init__(self, url: str, *, api_key: str | None = None, options: Mapping[str, Any] | None = None):
        """Raises ConfigError unless the URL is one of http or https."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            self._address = (parts.hostname or "", parts.port)
            self._is_secure = parts.scheme == "https"
            self._connect()  # makes no connection yet, and checks the name
            is_url = parts.scheme in ("http", "https") and self._address[0] != ""
        except (ValueError, http.client.InvalidURL):
            is_url = False
        if not is_url:
            raise ConfigError(
                f"server: must be a URL of http or https, got {url}. Pass one like http://127.0.0.1:8080."
            )
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._url, self._options = url, dict(options or {})
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def find_model(self) -> str:
        """The name of the first model that the server has; raises PlatformError if it does not answer."""
        connection = self._connect()
        try:
            connection.request("GET", f"{self._path}/models", headers=self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != http.client.OK:
                raise self._refusal(response.status, content)
            return str(json.loads(content)["data"][0]["id"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._failure(error) from error
        finally:
            connection.close()

    def stream(self, model: str, messages: Sequence[Mapping[str, str]]) -> Generator[str]:
        """Yield the parts of one answer; closing the iterator ends the computation on the server.

        Raises PlatformError if the server refuses, breaks off, or does not answer.
        """
        connection = self._connect()
        try:
            request = {"model": model, "messages": [*messages], "stream": True, **self._options}
            connection.request("POST", f"{self._path}/chat/completions", json.dumps(request), self._headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise self._refusal(response.status, response.read())
            yield from self._read_events(response)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._failure(error) from error
        finally:
            connection.close()

    def _read_events(self, response: http.client.HTTPResponse) -> Iterator[str]:
        while line := response.readline():
            content = line.strip().removeprefix(b"data:").strip()
            if content == b"[DONE]":
                return
            if not line.startswith(b"data:"):
                continue
            event = json.loads(content)
            if error := event.get("error"):
                raise self._refusal(error.get("code") if isinstance(error, dict) else None, content)
            # The last event may have the counts of tokens and no choice.
            for choice in event["choices"][:1]:
                # Half of a surrogate pair is no text that could be written.
                yield _SURROGATE.sub("\ufffd", choice["delta"].get("content") or "")
        raise http.client.IncompleteRead(b"")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        return kind(*self._address, timeout=_TIMEOUT_S)

    def _refusal(self, status: int | str | None, content: bytes) -> PlatformError:
        try:
            message = json.loads(content)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = content[:200].decode(errors="replace")
        return PlatformError(f"server: {self._url} must answer, got status {status or 500}: {message}")

    def _failure(self, error: Exception) -> PlatformError:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()
        return PlatformError(f"server: {self._url} must answer, got: {reason}. Is it running, and is this its address?")
