"""tools/serve.py and tools/chat.py as users and their clients meet them, well-meaning or not."""

import asyncio
import concurrent.futures
import gzip
import http.client
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hammer.checkpoint.gguf.to_gguf import GgufOptions, export_to_gguf
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers
from tests.helpers.gguf_models import write_vocabulary
from tests.helpers.messages import assert_errors
from tests.helpers.repository import ROOT
from tests.helpers.served_models import CONTEXT_TOKENS, PRIVATE_KEY, RunningServer, run_server, write_chat_folder
from tests.helpers.tool_runs import run_tool, run_tool_here

pytestmark = pytest.mark.integration
openai = pytest.importorskip("openai", reason="openai, the client of the tests, is missing; pip install openai")
_SERVING = "is missing; pip install megatron_hammer[serving]"
aiohttp = pytest.importorskip("aiohttp", reason=f"aiohttp {_SERVING}")
pytest.importorskip("xllamacpp", reason=f"xllamacpp {_SERVING}")

CHAT, PATH = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "the fox"}]
CONVERSATION = [
    {"role": "system", "content": "春眠不觉晓 fox"},
    {"role": "user", "content": " the dog"},
    {"role": "assistant", "content": "sleeps\n"},
    {"role": "user", "content": "the fox 🦊"},
]
NUM_SLOTS = 2
ENDLESS = {"ignore_eos": True, "max_tokens": CONTEXT_TOKENS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("served") / "toy-chat")


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    path = folder.with_name("toy-chat.gguf")
    export_to_gguf(GgufOptions(load_dir=folder, save_path=path, is_verified=False))
    return path


@pytest.fixture(scope="module")
def server(gguf: Path) -> Iterator[RunningServer]:
    key_file = gguf.with_name("keys")
    key_file.write_text(f"another-key\n{PRIVATE_KEY}\n")
    with run_server(gguf, "--parallel", str(NUM_SLOTS), "--api-key-file", key_file) as running:
        yield running


@pytest.fixture
def page_server(gguf: Path) -> Iterator[RunningServer]:
    """Without a key, for which the page would ask."""
    with run_server(gguf) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> "openai.OpenAI":
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=PRIVATE_KEY, max_retries=0)


# --- what clients of OpenAI expect -----------------------------------------------------------------------------------


def test_a_chat_is_streamed_and_equal_to_the_whole(client) -> None:
    request = {"model": "toy-chat", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert (text, len(chunks) > 3) == (whole.choices[0].message.content, True)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert client.models.list().data[0].id == "toy-chat"


def test_log_probabilities_of_the_likeliest_tokens(client) -> None:
    answer = client.chat.completions.create(
        model="toy-chat", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    steps = answer.choices[0].logprobs.content
    assert len(steps) == 4
    for step in steps:
        assert step.logprob == max(entry.logprob for entry in step.top_logprobs) <= 0
        assert len(step.top_logprobs) == 3


def test_a_stop_text_ends_an_answer(client) -> None:
    whole = client.completions.create(model="toy-chat", prompt="the", max_tokens=20, temperature=0).choices[0].text
    stop = next(character for character in whole[2:] if character.isascii() and character not in whole[:2])
    cut = client.completions.create(model="toy-chat", prompt="the", max_tokens=20, temperature=0, stop=[stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_wrong_key_is_refused_and_a_right_one_is_not(server: RunningServer) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="api key"):
        stranger.chat.completions.create(model="toy-chat", messages=MESSAGES)
    assert [server.ask("/metrics", key=key)[0] for key in (None, "wrong", PRIVATE_KEY)] == [401, 401, 200]
    assert server.ask(PATH, {"prompt": "a", "max_tokens": 1}, key="another-key")[0] == 200
    assert server.ask("/health", key=None) == (200, {"status": "ok"})


# --- the same tokens as in training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", [MESSAGES, CONVERSATION], ids=["one turn", "turns"])
def test_a_conversation_becomes_the_tokens_of_transformers(server: RunningServer, folder: Path, conversation) -> None:
    tokenizer = load_with_transformers(folder)
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    _, rendered = server.ask("/apply-template", {"messages": conversation})
    request = {"content": rendered["prompt"], "add_special": True, "parse_special": True}
    assert server.ask("/tokenize", request)[1]["tokens"] == expected
    assert expected.count(tokenizer.bos_token_id) == 1
    _, answer = server.ask(CHAT, {"messages": conversation, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == len(expected)


def test_the_end_of_a_turn_ends_an_answer(server: RunningServer, folder: Path) -> None:
    tokenizer = load_with_transformers(folder)
    bias = [[tokenizer.convert_tokens_to_ids("<|im_end|>"), 1000.0]]
    _, answer = server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 9, "logit_bias": bias})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == ""


def test_a_draft_model_changes_the_time_and_not_the_answer(server: RunningServer, gguf: Path) -> None:
    """The model proposes tokens to itself, so that all of them are right."""
    request = {"prompt": "the fox", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    _, expected = server.ask(PATH, request)
    with run_server(gguf, "--draft-model", gguf, "--draft-tokens", "3") as drafted:
        status, answer = drafted.ask(PATH, request)
    assert status == 200
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    assert answer["timings"]["draft_n_accepted"] == answer["timings"]["draft_n"] > 10
    assert "draft_n" not in expected["timings"]


# --- clients that are wrong, many, slow or gone ----------------------------------------------------------------------

DEEP = 100_000
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
WRONG = {
    "bad JSON": (b'{"messages": [', 400, "body"),
    "no UTF-8": (b'{"messages": "\xff"}', 400, "body"),
    "deep JSON": (b'{"messages":[],"x":' + b"[" * DEEP + b"]" * DEEP + b"}", 400, "body"),
    "JSON that llama.cpp would recurse into": (b'{"x":' + b"[" * 300 + b"]" * 300 + b"}", 400, "nested"),
    "10 MB": (json.dumps({"messages": [{"role": "user", "content": "fox " * 2_500_000}]}).encode(), 413, "body"),
    "prompt beyond the context": ({"messages": [{"role": "user", "content": "fox " * 40_000}]}, 400, "context"),
    "no messages": ({}, 400, "messages"),
    "text for messages": ({"messages": "hello"}, 400, "messages"),
    "role of the wrong type": ({"messages": [{"role": 5, "content": "a"}]}, 400, "messages"),
    "calls of the wrong type": ({"messages": MESSAGES, "tools": "x"}, 400, "tools"),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "image input"),
    "many messages": ({"messages": MESSAGES * 20_000}, 400, "messages"),
    "many sequence breakers": ({"messages": MESSAGES, "dry_sequence_breakers": ["ab"] * 50_000}, 400, "breakers"),
    "negative length": ({"messages": MESSAGES, "max_tokens": -7}, 400, "max_tokens"),
    "text for a number": ({"messages": MESSAGES, "temperature": "hot"}, 400, "temperature"),
    "huge n": ({"messages": MESSAGES, "n": 10**9}, 400, "'n'"),
    "a buffer of 8 GiB": ({"messages": MESSAGES, "repeat_last_n": 2**31 - 1}, 400, "repeat_last_n"),
    "the whole vocabulary": ({"messages": MESSAGES, "top_logprobs": 10**6}, 400, "top_logprobs"),
    "many prompts": ({"prompt": ["a"] * 5000}, 400, "prompt"),
    "a token of 33 bits": ({"prompt": [2**32]}, 400, "prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_gets_one_error_and_the_server_stays(server: RunningServer, name: str) -> None:
    body, status, field = WRONG[name]
    child = server.find_child()
    got, answer = server.ask(PATH if isinstance(body, dict) and "prompt" in body else CHAT, body)
    assert (got, field in answer["error"]["message"]) == (status, True), answer
    assert server.find_child() == child
    assert server.ask(PATH, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_request_that_is_no_http_is_one_error_and_no_trace(server: RunningServer) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n".encode()
    key = f"Authorization: Bearer {PRIVATE_KEY}\r\n".encode()
    wrong = {
        "method": (b"FOO / HTTP/1.1\r\n\r\n", 400),
        "path": (b"GET http://localhost/health HTTP/1.1\r\n\r\n", 400),
        "long URL": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 400),
        "chunk": (head + key + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        "not compressed": (head + key + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
        "key": (head + b"Authorization: Bearer \xff\r\nContent-Length: 2\r\n\r\n{}", 401),
    }
    for name, (content, status) in wrong.items():
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(content)
            assert connection.recv(100).split()[1] == str(status).encode(), name
    assert not select.select([server.process.stderr], [], [], 0)[0]


def test_a_token_that_the_model_has_not_is_the_clients_error(server: RunningServer) -> None:
    status, answer = server.ask("/detokenize", {"tokens": [10**9]})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_an_error_that_llama_cpp_says_in_plain_text_has_the_form_of_the_others(server: RunningServer) -> None:
    # Its page is compressed, and this client does not say that it reads that.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/", headers={"Authorization": f"Bearer {PRIVATE_KEY}", "Accept-Encoding": "identity"})
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (415, 415)


@pytest.mark.parametrize("first_line", ["OPTIONS *", "CONNECT localhost:1"])
def test_a_request_without_a_path_has_an_error_in_the_form_of_the_others(
    server: RunningServer, first_line: str
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"{first_line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.split()[1] == b"400"
    assert "path: must begin with a slash" in json.loads(body)["error"]["message"]


def test_no_messages_and_an_empty_prompt_are_answered(server: RunningServer) -> None:
    assert server.ask(CHAT, {"messages": [], "max_tokens": 2})[0] == 200
    assert server.ask(PATH, {"prompt": "", "max_tokens": 2})[0] == 200


def test_fifty_clients_at_once_are_all_answered(server: RunningServer) -> None:
    def ask(number: int) -> tuple[int, int]:
        status, answer = server.ask(CHAT, {"messages": [{"role": "user", "content": f"fox {number}"}], "max_tokens": 3})
        return status, answer["usage"]["completion_tokens"]

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {status for status, _ in answers} == {200}
    assert all(1 <= num_tokens <= 3 for _, num_tokens in answers)


def open_request(server: RunningServer, body: dict, *, num_missing_bytes: int = 0) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    content = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {PRIVATE_KEY}\r\nContent-Length: {len(content)}\r\n"
    )
    connection.sendall(head.encode() + b"\r\n" + content[: len(content) - num_missing_bytes])
    return connection


def wait_until_idle(server: RunningServer) -> None:
    deadline_s = time.monotonic() + 20
    while server.read_metric("requests_processing") + server.read_metric("requests_deferred"):
        assert time.monotonic() < deadline_s, "requests of clients that have left are still computed"
        time.sleep(0.05)


def test_a_client_that_leaves_frees_its_place(server: RunningServer) -> None:
    before = server.read_metric("tokens_predicted_total")
    connections = [open_request(server, {"prompt": "a", "stream": True, **ENDLESS}) for _ in range(12)]
    for connection in connections:
        connection.recv(64)  # the answer has begun, for which those before it must have left
        connection.close()
    wait_until_idle(server)
    num_computed = server.read_metric("tokens_predicted_total") - before
    assert num_computed < len(connections) * CONTEXT_TOKENS / 2
    assert server.ask(PATH, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_silent_clients_take_nothing_from_others(server: RunningServer) -> None:
    silent = [open_request(server, {"prompt": "a"}, num_missing_bytes=5) for _ in range(300)]
    assert server.ask("/health")[0] == 200
    assert server.ask(PATH, {"prompt": "a", "max_tokens": 1})[0] == 200
    for connection in silent:
        connection.close()


def test_clients_that_do_not_read_take_nothing_from_others(server: RunningServer) -> None:
    """Fewer than a minute, after which they are disconnected anyway."""
    status, tokens = server.ask("/tokenize", {"content": "fox " * 250_000})
    assert (status, len(tokens["tokens"]) > 100_000) == (200, True)  # more than the buffers of a connection hold
    content = json.dumps({"content": "fox " * 250_000}).encode()
    head = f"Host: a\r\nConnection: close\r\nAuthorization: Bearer {PRIVATE_KEY}\r\nContent-Length: "
    requests = [
        f"POST /tokenize HTTP/1.1\r\n{head}{len(content)}\r\n\r\n".encode() + content,
        f"GET {find_large_file(server)} HTTP/1.1\r\nAccept-Encoding: gzip\r\n{head}0\r\n\r\n".encode(),
    ]
    deaf = []
    for request in requests * (NUM_SLOTS + 4):  # more of each than there are places
        deaf.append(socket.socket())
        deaf[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf[-1].connect(("127.0.0.1", server.port))
        deaf[-1].sendall(request)
    wait_until_idle(server)
    for path, body in (("/health", None), (PATH, {"prompt": "a", "max_tokens": 1})):
        started_at_s = time.monotonic()
        assert server.ask(path, body)[0] == 200
        assert time.monotonic() - started_at_s < 30
    for connection in deaf:  # they get all of it when they read; nothing is left for the next test
        size = 0
        while part := connection.recv(1 << 20):
            size += len(part)
        assert size > 500_000
        connection.close()


def find_large_file(server: RunningServer) -> str:
    """The script of the web page, of megabytes."""
    with urllib.request.urlopen(urllib.request.Request(server.url, headers={"Accept-Encoding": "gzip"})) as page:
        found = re.search(r"/_app[^\"]*\.js", gzip.decompress(page.read()).decode())
    assert found is not None
    return found[0]


def test_llama_cpp_is_started_again_after_a_crash(server: RunningServer) -> None:
    before = server.find_child()
    os.kill(before, signal.SIGSTOP)  # so that the request is there and not yet answered
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        lost = pool.submit(server.ask, PATH, {"prompt": "a", "max_tokens": 4})
        time.sleep(2)  # for the request to come, also on a busy machine
        os.kill(before, signal.SIGKILL)
        status, answer = lost.result(timeout=30)
    assert (status, "llama.cpp" in answer["error"]["message"]) == (502, True)
    deadline_s = time.monotonic() + 60
    while server.ask("/health")[0] != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert server.find_child() != before
    assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


def test_llama_cpp_is_started_again_when_it_is_stuck(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_hammer.serving import llama_server

    monkeypatch.setattr(llama_server, "_PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(llama_server, "_LEAST_STUCK_S", 0.5)
    settings = llama_server.ServerSettings(path=gguf, name="toy", num_slots=1, num_threads=1, api_keys=("key",))
    request = {"prompt": "a", "max_tokens": 1, "grammar": 'root ::= (("a"?){100}){100}'}

    async def run() -> int:
        server = llama_server.LlamaServer(settings)
        await server.start()
        watch = asyncio.create_task(server.watch())
        await asyncio.sleep(1.0)  # some answers to the questions
        assert server.num_restarts == 0
        connector = aiohttp.UnixConnector(str(server.socket_path))
        headers = {"Authorization": "Bearer key"}
        async with aiohttp.ClientSession("http://localhost", connector=connector, headers=headers) as session:
            with pytest.raises(aiohttp.ClientError):
                await session.post(PATH, json=request)
        while not (server.num_restarts and server.is_ready):
            await asyncio.sleep(0.05)
        watch.cancel()
        await server.close()
        return server.num_restarts

    assert asyncio.run(asyncio.wait_for(run(), 60)) == 1
    assert "computed nothing" in capsys.readouterr().err


# --- the web page ----------------------------------------------------------------------------------------------------


def test_the_page_answers_in_a_browser(page_server: RunningServer) -> None:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives a browser, is missing; pip install playwright"
    )
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium is installed; install the system's package chromium")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(page_server.url)
        page.locator("textarea").first.fill("the fox")
        page.keyboard.press("Enter")
        page.get_by_text("t/s").first.wait_for(timeout=20_000)  # the speed is shown when an answer is complete
        browser.close()
    assert f"{page_server.url}/v1/chat/completions" in urls
    # Nothing is loaded from elsewhere: the page works on a machine without network.
    assert [url for url in urls if not url.startswith((page_server.url, "data:", "blob:"))] == []


# --- beginning and end -----------------------------------------------------------------------------------------------


def test_a_signal_ends_the_server_and_frees_its_port(gguf: Path, tmp_path: Path) -> None:
    with run_server(gguf) as running:
        child = running.find_child()
        taken = run_tool("tools/serve.py", "--model", gguf, "--port", str(running.port))
        assert taken.returncode == 2
        assert_errors(taken.stderr, ("port:", f"got {running.port}", "--port"))
        running.process.send_signal(signal.SIGTERM)
        stdout, stderr = running.process.communicate(timeout=30)
        assert (running.process.returncode, stderr) == (0, "")
        assert stdout.startswith("stopped: 0 requests answered")
        assert not Path(f"/proc/{child}").exists()
        socket.create_server(("127.0.0.1", running.port)).close()


def test_a_model_that_is_gone_after_a_crash_is_named_without_earlier_errors(gguf: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(gguf, tmp_path / "gone.gguf"))
    with run_server(model) as running:
        status, _ = running.ask(PATH, {"prompt": "a", "grammar": 'x ::= "a"'})
        assert status == 400
        model.unlink()
        os.kill(running.find_child(), signal.SIGKILL)
        _, stderr = running.process.communicate(timeout=60)
        assert running.process.returncode == 2
        assert "gone.gguf: llama.cpp must load the model, got: " in stderr
        assert "grammar" not in stderr


BAD_STARTS = {
    "no file": ("none.gguf", (), ("none.gguf:", "does not exist")),
    "no GGUF": ("text.gguf", (), ("text.gguf:", "must be a GGUF file", "hell")),
    "cut off": ("cut.gguf", (), ("cut.gguf:", "llama.cpp must load the model", "corrupted or incomplete")),
    "no template": ("base.gguf", (), ("base.gguf:", "chat template", "--no-chat")),
    "context": ("base.gguf", ("--context", "100000", "--no-chat"), ("context:", "32,768 tokens", "got 100,000")),
    "useless flag": ("base.gguf", ("--type", "q8_0"), ("base.gguf:", "--type", "GGUF file")),
    "keys": ("base.gguf", ("--api-key-file", "empty"), ("empty:", "keys", "got 0")),
    "a template without chat": (
        "base.gguf",
        ("--no-chat", "--chat-template", "qwen"),
        ("chat-template:", "no effect with --no-chat", "got qwen"),
    ),
    "numbers": ("base.gguf", ("--parallel", "0"), ("parallel:", "between 1 and 256", "got 0")),
    "draft": ("base.gguf", ("--no-chat", "--draft-model", "text.gguf"), ("text.gguf:", "must be a GGUF file")),
    "draft of another vocabulary": (
        "base.gguf",
        ("--no-chat", "--draft-model", "other.gguf"),
        ("other.gguf: draft-model", "token 1 must be", "got 'a'"),
    ),
    "draft that is not there": ("base.gguf", ("--draft-model", "none.gguf"), ("none.gguf:", "does not exist")),
    "tokens of no draft": ("base.gguf", ("--draft-tokens", "3"), ("draft-tokens:", "--draft-model", "got 3")),
    "vllm": ("base.gguf", ("--engine", "vllm"), ("base.gguf:", "vllm", "Hugging Face folder")),
}


@pytest.fixture(scope="module")
def bad_files(folder: Path, gguf: Path) -> Path:
    directory = folder.with_name("bad")
    directory.mkdir()
    (directory / "text.gguf").write_text("hello")
    (directory / "empty").write_text("\n")
    write_vocabulary(directory / "other.gguf", tokens=("<unk>", "a"), types=(2, 1), context=CONTEXT_TOKENS)
    content = gguf.read_bytes()
    (directory / "cut.gguf").write_bytes(content[: len(content) - 1000])
    base = shutil.copytree(folder, directory / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    export_to_gguf(GgufOptions(load_dir=base, save_path=directory / "base.gguf", is_verified=False))
    return directory


@pytest.mark.parametrize("name", BAD_STARTS)
def test_what_cannot_be_served_is_one_error(bad_files: Path, name: str) -> None:
    model, flags, (field, *facts) = BAD_STARTS[name]
    result = run_tool_here("tools/serve.py", "--model", model, "--port", "0", *flags, cwd=bad_files)
    assert (result.returncode, result.stdout) == (2, "")
    assert_errors(result.stderr, (field, *facts))


def test_a_context_that_does_not_fit_in_memory_is_one_error(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hammer.serving import llama_server

    # As on a machine with so little left: enough for the libraries, and not for 200 conversations.
    monkeypatch.setattr(llama_server, "_find_room", lambda path, header: 180 << 20)
    result = run_tool_here("tools/serve.py", "--model", gguf, "--port", "0", "--parallel", "200", "--threads", "1")
    assert result.returncode == 2
    assert_errors(result.stderr, (f"{gguf}:", "must fit in memory", "0.2 GiB", "200 conversations", "--parallel"))


def test_a_base_model_serves_completions_only(bad_files: Path) -> None:
    with run_server(bad_files / "base.gguf", "--no-chat") as running:
        assert running.ask(PATH, {"prompt": "a", "max_tokens": 2})[0] == 200
        for path in (CHAT, CHAT.replace("/chat", "/./chat"), f"{CHAT}/input_tokens", "/x/../apply-template"):
            status, answer = running.ask(path, {"messages": MESSAGES})
            assert (status, "chat template" in answer["error"]["message"]) == (400, True), path


# --- the terminal ----------------------------------------------------------------------------------------------------


def chat(lines: str, *flags: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "tools/chat.py"), *map(str, flags), "--system", "春", "--temperature", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "--max-tokens", "9"],
        input=lines,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=60,
    )


def test_a_conversation_through_a_pipe(server: RunningServer, tmp_path: Path) -> None:
    lines = "the fox\n/save first.jsonl\n/reset\n//help\n/save second.jsonl\n/exit\nnever read\n"
    (tmp_path / "key").write_text(PRIVATE_KEY)
    result = chat(lines, "--server", server.url, "--api-key-file", "key", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / name).read_text())["messages"] for name in ("first.jsonl", "second.jsonl"))
    assert [message["role"] for message in first] == ["system", "user", "assistant"] == [m["role"] for m in second]
    assert (first[1]["content"], second[1]["content"]) == ("the fox", "/help")
    assert result.stdout == f"{first[2]['content']}\n{second[2]['content']}\n"


def test_a_model_is_loaded_for_one_conversation(gguf: Path, tmp_path: Path) -> None:
    result = chat("the fox\n", "--model", gguf, "--threads", "1", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


def test_a_conversation_in_a_terminal(gguf: Path, tmp_path: Path) -> None:
    """A terminal of its own, as the progress of a conversion, prompts and Ctrl-C behave otherwise there."""
    command = [sys.executable, str(ROOT / "tools/chat.py"), "--model", str(gguf), "--threads", "1"]
    process_id, terminal = pty.fork()
    if process_id == 0:
        os.chdir(tmp_path)
        os.execve(command[0], command, {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"})
    try:
        wait_for(terminal, b"> ")
        os.write(terminal, b"half a line")
        wait_for(terminal, b"half a line")  # shown: a Ctrl-C takes back what is not yet read, for which readline waits
        wait_for(terminal, b"> ", press=b"\x03")
        os.write(terminal, b"the fox\n")
        wait_for(terminal, b"> ")
        os.write(terminal, b"/save x.jsonl\n/exit\n")
        _, status = os.waitpid(process_id, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "the fox" in (tmp_path / "x.jsonl").read_text()


def wait_for(terminal: int, text: bytes, press: bytes = b"") -> None:
    """press: a key that is pressed until the text comes, every 5 s; Python does not see each one."""
    shown, now_s = b"", time.monotonic()
    press_at_s, deadline_s = now_s, now_s + 30
    while text not in shown:
        now_s = time.monotonic()
        assert now_s < deadline_s, shown
        if press and now_s >= press_at_s:
            os.write(terminal, press)
            press_at_s = now_s + 5
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096)


def test_a_key_is_for_a_server_that_runs_already(gguf: Path) -> None:
    result = run_tool_here("tools/chat.py", "--model", gguf, "--api-key-file", "keys", cwd=gguf.parent)
    assert (result.returncode, result.stdout) == (2, "")
    assert_errors(result.stderr, ("api-key-file:", "got keys", "Leave it out"))


def test_a_chat_without_its_server_is_one_error(server: RunningServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run_tool_here("tools/chat.py", "--server", f"http://127.0.0.1:{port}")
    assert result.returncode == 2
    assert_errors(result.stderr, ("server:", f"{port}", "Connection refused"))
    result = run_tool_here("tools/chat.py", "--server", server.url)
    assert result.returncode == 2
    assert_errors(result.stderr, ("server:", "status 401", "API Key"))
