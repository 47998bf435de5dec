"""Runs llama.cpp, from the wheel of xllamacpp, on a GGUF file: tokens of texts and greedy continuations.

It runs in its own process (llama_cpp_process.py) and answers on a Unix socket in a private folder, so that no port is
opened. CPU only.
"""

import http.client
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_hammer.errors import ConversionError

FORCING_BIAS = 1e6  # of a logit: far beyond what any model computes
END_TIMEOUT_S = 30.0  # after that the process is killed
# -P: else Python puts the script's folder first on sys.path, where tokenizer.py and metadata.py would hide modules of
# other packages.
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("llama_cpp_process.py")))
_SETTINGS = {
    "n_parallel": 1,
    "n_threads_http": 1,
    "n_gpu_layers": 0,
    "fit_params": False,  # true would let llama.cpp choose unset parameters by the free device memory
    "warmup": False,
    "check_tensors": True,  # invalid data of a tensor is an error while loading, not a wrong token later
    # By default keys and values are kept in f16, which alone moves logits by more than f32 weights do.
    "cache_type_k": "GGML_TYPE_F32",
    "cache_type_v": "GGML_TYPE_F32",
    "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyStep:
    """One generated token, and the log-probabilities (nats) of the likeliest ones by id.

    log_probabilities: empty for a token that is a part of a character; llama.cpp says none there.
    """

    token: int
    log_probabilities: dict[int, float]


class LlamaCpp:
    """A running llama.cpp; obtain it with `open_llama_cpp`."""

    def __init__(self, path: Path, socket_path: Path, log_path: Path):
        self._path, self._log_path = path, log_path
        self._connection = _UnixConnection(socket_path)

    def tokenize(self, text: str, *, reads_control_tokens: bool = False, adds_ends: bool = False) -> list[int]:
        """The ids of a text. reads_control_tokens: one spelt out in the text becomes its id. adds_ends: with the tokens
        that the file says are put around every text.
        """
        request = {"content": text, "add_special": adds_ends, "parse_special": reads_control_tokens}
        return [int(token) for token in self._ask("POST", "/tokenize", request)["tokens"]]

    def continue_greedily(self, tokens: Sequence[int], *, num_tokens: int, num_likeliest: int) -> list[GreedyStep]:
        """At most `num_tokens` likeliest next tokens after `tokens`; it stops at the end of a text.

        One request per token: in longer answers llama.cpp omits tokens that end inside a character.
        """
        steps: list[GreedyStep] = []
        while len(steps) < num_tokens:
            prompt = [*tokens, *(step.token for step in steps)]
            answer = self.complete(prompt, num_likeliest=num_likeliest)
            if answer["stop_type"] == "eos" or not answer["tokens"]:
                break
            likeliest = [entry for step in answer.get("completion_probabilities", []) for entry in step["top_logprobs"]]
            log_probabilities = {entry["id"]: entry["logprob"] for entry in likeliest}
            steps.append(GreedyStep(token=answer["tokens"][0], log_probabilities=log_probabilities))
        return steps

    def complete(self, tokens: Sequence[int], *, forced: int | None = None, num_likeliest: int = 0) -> dict[str, Any]:
        """The answer with the likeliest next token, or `forced` in its place; probabilities in it are the model's.

        num_likeliest: how many tokens it lists with their log-probabilities (nats), the likeliest first.
        """
        request = {
            "prompt": [int(token) for token in tokens],
            "n_predict": 1,
            # top_k of 1 is the greedy choice. It is the only sampler here, so that no other can change it.
            "samplers": ["top_k"],
            "top_k": 1,
            # Added to the logit before the choice, and not to the probabilities in the answer.
            "logit_bias": [] if forced is None else [[forced, FORCING_BIAS]],
            "n_probs": num_likeliest,
            "return_tokens": True,
            # Each request repeats the last one's tokens and one more; only that one is computed.
            "cache_prompt": True,
        }
        return self._ask("POST", "/completion", request)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ids; U+FFFD where they end inside a character."""
        return str(self._ask("POST", "/detokenize", {"tokens": [*tokens]})["content"])

    def read_model(self) -> dict[str, Any]:
        """What llama.cpp says of the loaded model: `n_ctx` tokens of context, `n_vocab`, `ftype`."""
        described: dict[str, Any] = self._ask("GET", "/v1/models")["data"][0]["meta"]
        return described

    def continue_text(self, tokens: Sequence[int], *, num_tokens: int, reuses_prompt: bool = False) -> dict[str, Any]:
        """One greedy answer of exactly `num_tokens` tokens: its `content`, and llama.cpp's `timings`.

        reuses_prompt: what the last request and this one begin with is not computed again.
        """
        # llama.cpp closes a connection that is idle for some seconds. The next request opens another one.
        self._connection.close()
        # As in continue_greedily; ignore_eos, so that answers of several models have one length.
        greedy = {"samplers": ["top_k"], "top_k": 1, "n_predict": num_tokens, "ignore_eos": True}
        return self._ask("POST", "/completion", {"prompt": [*tokens], "cache_prompt": reuses_prompt, **greedy})

    def read_properties(self) -> dict[str, Any]:
        """What llama.cpp says of the file, such as `bos_token` and `chat_template`."""
        return self._ask("GET", "/props")

    def render(self, conversation: Sequence[Mapping[str, str]]) -> str:
        """The prompt that the chat template makes; or the error, where the template refuses the conversation."""
        status, content = self._exchange("POST", "/apply-template", {"messages": [*conversation]})
        answer = json.loads(content)
        return str(answer["prompt"] if status == http.client.OK else answer["error"]["message"])

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        status, content = self._exchange(method, path, body)
        if status != http.client.OK:
            raise ConversionError(
                f"{self._path}: llama.cpp must answer {path}, got status {status}: {content[:300]!r}. "
                "If the machine has memory left, this is a defect of the converter."
            )
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """Status and content of an answer."""
        try:
            self._connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _describe_failure(self._path, self._log_path) from error


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, socket_path: Path):
        super().__init__("localhost")
        self._socket_path = str(socket_path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # HTTPConnection connects to a host and port; everything else of it works on any stream.
        self.sock.connect(self._socket_path)


@contextmanager
def open_llama_cpp(
    path: Path, *, num_context_tokens: int, num_threads: int, more: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[LlamaCpp]:
    """Load a GGUF file with llama.cpp and yield it; it ends with the block. more: further attributes by their path.

    Raises ConversionError if llama.cpp does not load the file or dies on it, with what it said last.
    """
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder, open(Path(folder) / "log", "w+b") as log:
        socket_path, log_path = Path(folder) / "llama.sock", Path(folder) / "log"
        settings = {
            **_SETTINGS,
            "model.path": str(path.resolve()),
            "hostnames": [str(socket_path)],
            "n_ctx": num_context_tokens,
            "cpuparams.n_threads": num_threads,
            "cpuparams_batch.n_threads": num_threads,
            **more,
        }
        # stdin stays open as long as this process lives.
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            # An empty line means that the process ended before it was ready; the reason is in its log.
            if process.stdout.readline().strip() != b"ready":
                raise _describe_failure(path, log_path)
            llama_cpp = LlamaCpp(path, socket_path, log_path)
            yield llama_cpp
            llama_cpp.close()
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Close its stdin, which asks it to end, and kill it if it does not."""
    try:
        process.communicate(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _describe_failure(path: Path, log_path: Path) -> ConversionError:
    lines = log_path.read_text(errors="replace").splitlines()
    return ConversionError(
        f"{path}: llama.cpp must load the file and answer, got: {select_errors(lines)}. "
        "If the machine has memory left, this is a defect of the converter."
    )


def select_errors(lines: Sequence[str]) -> str:
    """The lines of llama.cpp's log that say what went wrong: the first ones have the cause, the last one the end."""
    # "E" in front of a line is the level of an error in llama.cpp's log (common/log.cpp). Most lines are information.
    said = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "assert", " e "))]
    chosen = [*said[:2], *said[2:][-1:]] or lines[-3:]
    return " | ".join(chosen)[:600]
