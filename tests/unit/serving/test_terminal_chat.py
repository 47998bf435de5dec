"""What is typed and what comes of it, with a model that answers as the test says."""

import io
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError, DataError, OutputError, PlatformError
from megatron_hammer.serving.chat_client import ChatClient
from megatron_hammer.serving.terminal_chat import TerminalChat
from tests.helpers.messages import raises_problem


class Model:
    """Counts up to the number of messages. asked: what it was given. ends: what is raised after the first part."""

    def __init__(self, ends: BaseException | None = None):
        self.asked: list[list[dict[str, str]]] = []
        self.ends = ends
        self.is_closed = False

    def stream(self, model: str, messages: list[dict[str, str]]) -> Generator[str]:
        self.asked.append(messages)
        try:
            for number in range(len(messages)):
                yield f"{number} "
                if self.ends is not None:
                    raise self.ends
        finally:
            self.is_closed = True


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Connection(io.BytesIO):
    """An HTTP connection to a server that answers every request with the same events."""

    status = 200

    def __init__(self, events: str):
        super().__init__(events.encode())

    def request(self, *arguments: Any) -> None:
        pass

    def getresponse(self) -> "Connection":
        return self


def make_chat(model: Model, *, is_terminal: bool = False, system: str | None = None) -> TerminalChat:
    out = Terminal() if is_terminal else io.StringIO()
    return TerminalChat(model, "m", system, out=out, notes=io.StringIO())  # type: ignore[arg-type]


def test_every_line_is_a_turn_of_one_conversation() -> None:
    chat = make_chat(model := Model(), system="short")
    chat.run_pipe([b"one\n", b"\n", b"  two\n"])
    assert chat.out.getvalue() == "0 1 \n0 1 2 3 \n"
    assert model.asked[1] == [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "0 1 "},
        {"role": "user", "content": "two"},
    ]


@pytest.mark.parametrize(
    "event, match",
    [
        ('{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}', "status rate_limit_exceeded: slow down"),
        ('{"error": "out of memory"}', 'status 500: {"error": "out of memory"}'),
        ('{"choices": [{"delta": null}]}', "must answer, got: AttributeError"),
        ('{"choices": [{"delta": {"content": ["a"]}}]}', "must answer, got: TypeError"),
        ("[]", "must answer, got: AttributeError"),
    ],
)
def test_an_event_of_another_form_is_one_error(event: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half = '{"error": null, "choices": [{"delta": {"content": "a\\ud83d"}}]}'
    client = ChatClient("http://localhost:1")
    monkeypatch.setattr(client, "_connect", lambda: Connection(f"data: {half}\n\n: note\ndata:{event}\n\n"))
    answer = client.stream("m", [])
    assert next(answer) == "a\ufffd"
    with pytest.raises(PlatformError, match=re.escape(match)):
        next(answer)


def test_lines_of_other_systems_and_of_other_encodings() -> None:
    chat = make_chat(model := Model())
    with raises_problem(DataError, "stdin:4", "UTF-8", r"b'\xc4\xe3"):
        chat.run_pipe([b"\xef\xbb\xbfone\r\n", b"\r\n", "春\r\n".encode(), b"\xc4\xe3\n", b"never\n"])
    assert [asked[-1]["content"] for asked in model.asked] == ["one", "春"]


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:99999", "http://[::1", "http://a b"])
def test_an_address_that_is_no_url(url: str) -> None:
    with raises_problem(ConfigError, "server", "URL of http", url):
        ChatClient(url)


def test_commands_are_not_sent_and_two_slashes_are_one() -> None:
    chat = make_chat(model := Model(), system="short")
    chat.run_pipe([b"one\n", b"/reset\n", b"//two\n", b"/exit\n", b"three\n"])
    assert [[message["content"] for message in asked] for asked in model.asked] == [["short", "one"], ["short", "/two"]]


def test_a_conversation_is_saved_once_and_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "chat 1.jsonl"
    chat = make_chat(Model())
    chat.run_pipe(["春\n".encode(), f"/save {path}\n".encode()])
    expected = [{"role": "user", "content": "春"}, {"role": "assistant", "content": "0 "}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"messages": expected}]
    with raises_problem(OutputError, "/save:", "new file", str(path)):
        chat.run_pipe([f"/save {path}\n".encode()])
    with raises_problem(OutputError, "/save:", "new file", "''"):
        chat.run_pipe([b"/save\n"])


def test_a_script_notices_what_goes_wrong() -> None:
    with raises_problem(ConfigError, "/sav:", "/save", "//"):
        make_chat(Model()).run_pipe([b"/sav x\n", b"never\n"])
    chat = make_chat(Model(PlatformError("server: gone")))
    with raises_problem(PlatformError, "server: gone"):
        chat.run_pipe([b"one\n", b"never\n"])
    with pytest.raises(KeyboardInterrupt):
        make_chat(Model(KeyboardInterrupt())).run_pipe([b"one\n"])


def read_from(lines: Iterator[str | BaseException]) -> Any:
    def read_line() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read_line


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is_of_it() -> None:
    chat = make_chat(model := Model(KeyboardInterrupt()), is_terminal=True)
    chat.run_terminal(read_from(iter(["one", "two"])))
    assert model.is_closed
    assert [message["content"] for message in model.asked[1]] == ["one", "0 ", "two"]
    assert chat.notes.getvalue().count("(stopped)") == 2


def test_ctrl_c_at_the_prompt_and_errors_end_nothing_in_a_terminal() -> None:
    chat = make_chat(model := Model(), is_terminal=True)
    chat.run_terminal(read_from(iter([KeyboardInterrupt(), "/nope", "/help", "one", "/exit", "never"])))
    assert [asked[-1]["content"] for asked in model.asked] == ["one"]
    assert "error: /nope: must be" in chat.notes.getvalue()
    assert "/save FILE" in chat.notes.getvalue()


def test_a_question_that_the_server_refuses_is_not_part_of_the_conversation() -> None:
    class Full(Model):
        def stream(self, model: str, messages: list[dict[str, str]]) -> Generator[str]:
            raise PlatformError("server: full")
            yield ""

    chat = make_chat(Full(), is_terminal=True)
    chat.run_terminal(read_from(iter(["long"])))
    assert (chat.messages, "error: server: full" in chat.notes.getvalue()) == ([], True)


@pytest.mark.parametrize("is_terminal, shown", [(True, "春\ufffd[2J\n\t\n"), (False, "春\x1b[2J\n\t\n")])
def test_a_model_cannot_steer_the_terminal(is_terminal: bool, shown: str) -> None:
    class Steering(Model):
        def stream(self, model: str, messages: list[dict[str, str]]) -> Generator[str]:
            yield "春\x1b[2J\n\t"

    chat = make_chat(Steering(), is_terminal=is_terminal)
    chat.run_pipe([b"one"])
    assert (chat.out.getvalue(), chat.messages[-1]["content"]) == (shown, "春\x1b[2J\n\t")
