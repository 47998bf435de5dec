"""A conversation in the terminal or in a pipe: lines in, answers out as they are computed.

In a terminal, Ctrl-C stops the answer that is being written and keeps what there is of it. From a pipe every line is a
turn, only answers are written, and an error ends the conversation, so that a script notices.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from megatron_hammer.errors import ConfigError, DataError, HammerError, OutputError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.serving.chat_client import ChatClient

HELP = """/reset       begin again, with the same system prompt
/save FILE   write the conversation as one line of JSON, as the tools for chat data read it
/exit        end, as Ctrl-D
Ctrl-C stops an answer. A line that begins with two slashes is sent with one."""

# A model may write any characters, also those with which a terminal is told to move, hide or rename things.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _End(Exception):
    """The user has asked for the end."""


@dataclass
class TerminalChat:
    """One conversation. out, notes: where answers and everything else go."""

    client: ChatClient
    model: str
    system: str | None = None
    out: TextIO = field(default_factory=lambda: sys.stdout)
    notes: TextIO = field(default_factory=lambda: sys.stderr)
    messages: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def run_pipe(self, lines: Iterable[bytes]) -> None:
        """Answer every line; raises HammerError at the first that cannot be answered, KeyboardInterrupt at Ctrl-C."""
        with suppress(_End):
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError:
                    raise DataError(f"stdin:{number}: must be UTF-8, got {line[:40]!r}. Convert the text.") from None
                self._take(text)

    def run_terminal(self, read_line: Callable[[], str]) -> None:
        """Ask for lines until /exit or the end of the input; errors are printed, and the conversation continues."""
        print(f"{self.model}: type a message, or /help", file=self.notes)
        while True:
            try:
                self._take(read_line())
            except (_End, EOFError):
                return
            except KeyboardInterrupt:
                print("\n(/exit ends)", file=self.notes)
            except HammerError as error:
                print(f"error: {error}", file=self.notes)

    def _take(self, line: str) -> None:
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            self._obey(*text.split(maxsplit=1))
        elif text:
            self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _obey(self, command: str, argument: str = "") -> None:
        match command:
            case "/exit":
                raise _End
            case "/help":
                print(HELP, file=self.notes)
            case "/reset":
                self.reset()
            case "/save":
                self._save(argument)
            case _:
                raise ConfigError(f"{command}: must be /reset, /save, /exit or /help. A message begins with //.")

    def _save(self, name: str) -> None:
        path = Path(name)
        if not name or path.exists():
            raise OutputError(f"/save: must be followed by the name of a new file, got {name!r}. Choose another name.")
        publish_files({path: json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"})
        print(f"saved {len(self.messages)} messages in {path}", file=self.notes)

    def _answer(self, text: str) -> None:
        """Write the answer as it comes; what was not answered at all is not part of the conversation."""
        question = {"role": "user", "content": text}
        parts: list[str] = []
        try:
            with closing(self.client.stream(self.model, [*self.messages, question])) as answer:
                for part in answer:
                    parts.append(part)
                    self.out.write(_CONTROLS.sub("\ufffd", part) if self.out.isatty() else part)
                    self.out.flush()
        except KeyboardInterrupt:
            if not self.out.isatty():
                raise
            self.notes.write(" (stopped)")
        finally:
            if content := "".join(parts):
                self.messages += [question, {"role": "assistant", "content": content}]
        self.out.write("\n")
        self.out.flush()
