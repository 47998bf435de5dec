"""Draws the recorded terminal of a command as an SVG: docs/images/terminal.svg is made with it.

    script -qefc "bash examples/pretrain_hammer_1b4.sh" recording.txt
    python docs/images/draw_terminal.py recording.txt docs/images/terminal.svg

Only what stays on the screen is drawn: of a line that the program overwrote, the last state.
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 112
MAX_LINES = 80  # of the picture; a longer one loses lines in its middle


def read_screen(recording: bytes, hidden_folders: list[str]) -> list[str]:
    """The lines that are left of a recording of `script`, with their colours; without its own first and last line.

    hidden_folders: left out of the paths.
    """
    text = recording.decode("utf-8", errors="replace").replace("\r\n", "\n")
    text = re.sub(r"\x1b\[\?25[lh]|\x1b\]8;[^\x1b\x07]*(?:\x1b\\|\x07)", "", text)  # cursor on and off, links
    lines = []
    for line in text.split("\n"):
        states = [state for state in re.split(r"\r|\x1b\[2K|\x1b\[1A", line) if Text.from_ansi(state).plain.strip()]
        lines.append(hide(states[-1].rstrip(), hidden_folders) if states else "")
    return [line for line in lines if not line.startswith("Script ") and not is_progress(Text.from_ansi(line).plain)]


def hide(line: str, folders: list[str]) -> str:
    """The line without the folders; a row of a box keeps its width."""
    length = len(line)
    for folder in folders:
        line = line.replace(f"{folder.rstrip('/')}/", "")
    is_row = line.startswith("│") and line.endswith("│")
    return line[:-1] + " " * (length - len(line)) + "│" if is_row else line


def is_progress(line: str) -> bool:
    """Whether the line is a bar that its command takes away at the end; the bar of the training steps stays."""
    return "━━━" in line and not line.startswith("step ")


def shorten(lines: list[str]) -> list[str]:
    """At most MAX_LINES lines: the first and the last ones, with a line of dots between them."""
    if len(lines) <= MAX_LINES:
        return lines
    half = (MAX_LINES - 1) // 2
    return [*lines[:half], "  ...", *lines[-half:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--title", default="bash examples/pretrain_hammer_1b4.sh")
    parser.add_argument("--hide", action="append", default=[], help="a folder that is left out of the paths")
    arguments = parser.parse_args()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in shorten(read_screen(arguments.recording.read_bytes(), arguments.hide)):
        console.print(Text.from_ansi(line), overflow="ellipsis", no_wrap=True)
    console.save_svg(str(arguments.output), title=arguments.title)


if __name__ == "__main__":
    main()
