"""A small model with a chat template, as a folder and as a GGUF file, and tools/serve.py running on it."""

import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.tokenizer.encoding.sentencepiece_model import read_sentencepiece_model
from tests.helpers.gguf_models import write_gguf_source
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.tool_runs import start_tool
from tests.helpers.toy_tokenizer import write_llama_folder

CONTEXT_TOKENS = 32_768  # seconds of computing, within which a server can notice that a client has left
PRIVATE_KEY = "a-key-of-the-tests"


def write_chat_folder(folder: Path, options: str = "plain", **changes: Any) -> Path:
    """A Hugging Face folder whose tokenizer has ChatML's tokens and template, and puts a BOS before every text."""
    model_path = train_model(folder.with_name(f"{folder.name}.model"), **MODEL_OPTIONS[options])
    num_pieces = len(read_sentencepiece_model(model_path).pieces)
    sizes = {"vocab_size": num_pieces + 7, "num_hidden_layers": 1, "max_position_embeddings": CONTEXT_TOKENS}
    write_gguf_source(folder, "llama", **sizes)
    for path in folder.glob("*token*"):
        path.unlink()
    return write_llama_folder(folder, model_path, num_pieces, **changes)


@dataclass
class RunningServer:
    """A server of tools/serve.py. process: of the tool; its child is llama.cpp."""

    process: "subprocess.Popen[str]"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, *, key: str | None = PRIVATE_KEY, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and content, read as JSON where it is some; POST if there is a body, of bytes or to become JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        sent = {"Content-Type": "application/json", **(headers or {})}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        connection.request("GET" if body is None else "POST", path, content, sent)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text

    def read_metric(self, name: str) -> int:
        """A number that llama.cpp counts."""
        _, text = self.ask("/metrics")
        match = re.search(rf"^llamacpp:{name} (\d+)$", text.decode(), re.MULTILINE)
        assert match is not None, text
        return int(match[1])

    def find_child(self) -> int:
        """The process id of llama.cpp."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (child,) = map(int, children)
        return child


@contextmanager
def run_server(model: Path, *flags: str | Path) -> Iterator[RunningServer]:
    """Serve on a free port; the server is ended with the block, if it still runs."""
    process = start_tool("tools/serve.py", "--model", model, "--port", "0", "--threads", "1", *flags)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"at http://127\.0\.0\.1:(\d+) ", line)
        assert match is not None, line + process.communicate(timeout=30)[1]
        yield RunningServer(process, int(match[1]))
    finally:
        if process.poll() is None:
            process.terminate()  # it removes its folder
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # llama.cpp ends when its stdin is closed
                process.communicate()
