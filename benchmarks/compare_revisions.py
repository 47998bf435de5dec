#!/usr/bin/env python3
"""Whether two revisions of this repository give the same results, for a change that is not meant to change any.

    python benchmarks/compare_revisions.py record --checkout ../old --output recordings/old
    python benchmarks/compare_revisions.py record --checkout . --output recordings/new
    python benchmarks/compare_revisions.py compare recordings/old recordings/new

`record` makes text, models and tables from fixed seeds (revisions/material.py) and runs about 250 command lines of the
checkout on them (revisions/commands.py): tools/, checkpoint_convert/, examples/ and the pretraining module. It imports
nothing of the package, so modules may move. For each command it writes one text file: the exit code, what was printed
as JSON or CSV, the numbers, flags, names and paths of messages, and every file that the command wrote: text as it is,
each tensor and every other file as a hash (revisions/results.py). The sentences of messages are in a section of their
own, `wording`: pass `--ignore wording` to `compare` where sentences were changed on purpose. Elapsed times, memory use
and absolute paths are not recorded.

`compare` prints a table of sections, lists the items that differ with their first lines, and ends with 1 if there are
any. Recordings of one machine and environment can be compared; the section `environment` says if they differ in that.
"""

import argparse
import difflib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from revisions.commands import build_sections
from revisions.material import write_material
from revisions.process import run_command
from revisions.results import PART, Kind, describe_file, describe_stream, hash_bytes

ABOUT = "about.json"  # written last: a recording without it is incomplete
WORDING, WORK = "wording", "work"
MAX_LINES_SHOWN, MAX_LINE_LENGTH = 6, 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Where a recording is made of what."""

    checkout: Path
    output_dir: Path
    data_dir: Path | None
    work_dir: (
        Path  # a temporary one, whose path always has the same length: checkpoints store paths, and tell their size
    )

    def write_item(self, section: str, name: str, lines: list[str]) -> None:
        path = self.output_dir / section / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def normalize(self, text: str) -> str:
        """Without absolute paths of this recording."""
        places = {self.work_dir: "<work>", self.data_dir: "<data>", self.checkout: "<checkout>", sys.prefix: "<python>"}
        for place, name in places.items():
            if place is not None:
                text = text.replace(str(place), name)
        return text

    def build_environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        return kept | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(self.checkout),
            "LANG": "C.UTF-8",
            "COLUMNS": "160",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "NLTK_DATA": str(self.work_dir / "nltk"),
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }


# --- record ----------------------------------------------------------------------------------------------------------


def record(recording: Recording, chosen: list[str], jobs: int) -> None:
    """Run the commands of the chosen sections (none: all), and write what they did."""
    started_at_s = time.monotonic()
    sections = build_sections(recording.data_dir)
    unknown = [name for name in chosen if name not in sections]
    if unknown:
        sys.exit(f"error: sections: must be of {', '.join(sections)}, got {', '.join(unknown)}. Change --sections.")
    revision = read_revision(recording.checkout)
    os.environ.update(recording.build_environment())
    require_checkout(recording)
    recording.write_item("environment", "versions", [f"{PART}packages", *list_versions()])
    write_material(recording.work_dir)
    record_material(recording)
    first, *others = sections.items()  # all others use what the first one makes
    others = [(name, commands) for name, commands in others if name in chosen or not chosen]
    durations_s = dict([record_section(recording, *first)])
    with ThreadPoolExecutor(jobs) as pool:
        durations_s |= dict(pool.map(lambda section: record_section(recording, *section), others))
    elapsed_s = round(time.monotonic() - started_at_s)
    about = {"revision": revision, "elapsed_s": elapsed_s, "sections": durations_s}
    (recording.output_dir / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    num_items = sum(map(len, read_items(recording.output_dir).values()))
    print(f"{recording.output_dir}: {revision}, {num_items:,} items; {elapsed_s} s")


def require_checkout(recording: Recording) -> None:
    """An installed copy of the package must not stand in for the checkout's."""
    code = "import importlib.util; print(importlib.util.find_spec('megatron_hammer').origin)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=recording.work_dir, capture_output=True, text=True, check=True)
    origin = found.stdout.strip()
    if not Path(origin).is_relative_to(recording.checkout):
        sys.exit(f"error: checkout: its package must be the one that is imported, got {origin}. Check --checkout.")


def list_versions() -> list[str]:
    packages = ("torch", "megatron-core", "transformers", "numpy", "scipy", "sentencepiece", "safetensors", "gguf")
    lines = [f"python {platform.python_version()}", f"processor {platform.machine()}", f"cores {os.cpu_count()}"]
    for name in (*packages, "tokenizers", "pyarrow", "matplotlib", "rich", "nltk", "datasketch", "xllamacpp"):
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} absent")
    return lines


def record_material(recording: Recording) -> None:
    for folder in sorted(recording.work_dir.iterdir()):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{path.relative_to(folder)} {hash_bytes(path.read_bytes())}" for path in paths]
        recording.write_item("material", folder.name, [f"{PART}files", *lines])


def record_section(recording: Recording, section: str, commands: dict[str, str]) -> tuple[str, int]:
    started_at_s = time.monotonic()
    folder = recording.work_dir / section
    folder.mkdir(exist_ok=True)
    for name, command in commands.items():
        before = list_files(folder)
        kind = select_kind(command)
        finished = run_command(
            command, checkout=recording.checkout, folder=folder, environment=recording.build_environment()
        )
        changed = [path for path, state in list_files(folder).items() if before.get(path) != state]
        results = [
            describe_stream("stdout", recording.normalize(finished.stdout), kind),
            describe_stream("stderr", recording.normalize(finished.stderr), kind),
            *(describe_file(path, str(path.relative_to(folder)), recording.normalize) for path in changed),
        ]
        header = [f"{PART}command", recording.normalize(command), f"exit code {finished.exit_code}"]
        recording.write_item(section, name, header + [line for facts, _ in results for line in facts])
        recording.write_item(WORDING, f"{section}.{name}", [line for _, wording in results for line in wording])
        print(f"{section}: {name}", file=sys.stderr, flush=True)
    return section, round(time.monotonic() - started_at_s)


def select_kind(command: str) -> Kind:
    """What a command prints on its standard streams."""
    if "training.pretrain" in command and "--dry-run" not in command:
        return "run"
    return "data" if "generate_sample.py" in command or "--document" in command else "messages"


def list_files(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Every file below the folder with what a rewriting changes."""
    states = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: (state.st_mtime_ns, state.st_size, state.st_ino) for path, state in states.items()}


def read_revision(checkout: Path) -> str:
    def run_git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", checkout, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    return run_git("rev-parse", "HEAD") + (" with changes" if run_git("status", "--porcelain") else "")


# --- compare ---------------------------------------------------------------------------------------------------------


def compare(old_dir: Path, new_dir: Path, ignored: list[str]) -> bool:
    """Print a table of sections and the items that differ; returns whether all items are identical."""
    recorded = [read_about(folder)["sections"] for folder in (old_dir, new_dir)]
    old, new = read_items(old_dir), read_items(new_dir)
    partial = sorted(recorded[0].keys() ^ recorded[1].keys())
    left_out = [*ignored, *partial]
    print(f"\n{'section':<15}  {'items':>6}  {'lines':>7}  {'identical':>9}  {'different':>9}")
    num_items, different = 0, []
    for section in dict.fromkeys([*old, *new]):
        names = sorted(old.get(section, {}).keys() | new.get(section, {}).keys())
        names = [name for name in names if not {section, name.partition(".")[0]} & set(left_out)]
        if not names:
            continue
        before, after = ([items.get(section, {}).get(name) for name in names] for items in (old, new))
        changes = [(f"{section}/{name}", *pair) for name, *pair in zip(names, before, after, strict=True)]
        changes = [change for change in changes if change[1] != change[2]]
        num_lines = sum(text.count("\n") for text in before if text)
        counts = f"{len(names):>6,}  {num_lines:>7,}  {len(names) - len(changes):>9,}  {len(changes):>9,}"
        print(f"{section:<15}  {counts}")
        num_items += len(names)
        different += changes
    for name, one, other in different:
        print("\n".join([f"\n{name}", *list_differences(one, other)]))
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    print(f"\n{num_items:,} items, {num_items - len(different):,} identical, {len(different):,} different{note}")
    return not different


def read_about(folder: Path) -> dict[str, Any]:
    """What the recording says of itself; raises SystemExit if it is not complete."""
    if not (folder / ABOUT).is_file():
        sys.exit(f"error: {folder}: must be a complete recording, got no {ABOUT}. Record it again.")
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    print(f"{folder}: {about['revision']}, sections {', '.join(about['sections'])}")
    return about


def read_items(folder: Path) -> dict[str, dict[str, str]]:
    """Text of each item by section and name: what a command printed on one stream, or one file that it wrote."""
    items: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*/*.txt")):
        if path.parent.name == WORK:
            continue
        section = items.setdefault(path.parent.name, {})
        for part in ("\n" + path.read_text(encoding="utf-8")).split(f"\n{PART}")[1:]:
            name, _, text = part.partition("\n")
            section[f"{path.stem}: {name}"] = section.get(f"{path.stem}: {name}", "") + text + "\n"
    return items


def list_differences(old: str | None, new: str | None) -> list[str]:
    """The first lines that differ, - of the old recording and + of the new one."""
    if old is None or new is None:
        return [f"  only in the {'new' if old is None else 'old'} recording"]
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[2:]
    lines = [line[:MAX_LINE_LENGTH] for line in lines if not line.startswith("@@")]
    rest = [f"  and {len(lines) - MAX_LINES_SHOWN} more lines"] if len(lines) > MAX_LINES_SHOWN else []
    return [*(f"  {line}" for line in lines[:MAX_LINES_SHOWN]), *rest]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("record", help="run the command lines of a checkout and write what they did")
    command.add_argument("--checkout", type=Path, required=True, help="folder of the repository at the revision")
    command.add_argument("--output", type=Path, required=True, help="folder to make")
    command.add_argument(
        "--data-dir",
        type=Path,
        help="folder with scaling/published_{runs,memory,moe}.csv, tokenizer/*.model and corpus/*.jsonl: recorded too",
    )
    command.add_argument("--sections", nargs="+", default=[], help="record only these, and tokenizer (all)")
    command.add_argument("--jobs", type=int, default=2, help="sections that run at the same time (%(default)s)")
    command.add_argument("--keep-work", action="store_true", help="keep what the commands wrote, in OUTPUT/work")
    command = commands.add_parser("compare", help="compare two recordings; exit code 1 if they differ")
    command.add_argument("old", type=Path, help="recording of the revision before the change")
    command.add_argument("new", type=Path, help="recording of the revision after it")
    command.add_argument("--ignore", nargs="+", default=[], metavar="SECTION", help="sections to leave out")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "compare":
        sys.exit(0 if compare(arguments.old, arguments.new, arguments.ignore) else 1)
    if arguments.output.exists():
        sys.exit(f"error: {arguments.output}: must not exist yet, got a file or folder. Pass another --output.")
    work_dir = Path(tempfile.mkdtemp(prefix="compare-revisions-"))
    recording = Recording(
        checkout=arguments.checkout.resolve(),
        output_dir=arguments.output.resolve(),
        data_dir=arguments.data_dir.resolve() if arguments.data_dir is not None else None,
        work_dir=work_dir.resolve(),
    )
    try:
        record(recording, arguments.sections, arguments.jobs)
        if arguments.keep_work:
            shutil.copytree(work_dir, recording.output_dir / WORK)
    finally:
        shutil.rmtree(work_dir)


if __name__ == "__main__":
    main()
