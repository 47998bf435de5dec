"""The `hammer` command: its map, its names, its speed. Standard library only."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest

from megatron_hammer.cli.hammer import COMMANDS, GROUPS, main
from tests.helpers.imports import MODULES, PACKAGE, iterate_imports, parse
from tests.helpers.repository import ROOT

MAX_SECONDS = 0.3
NUM_ROUNDS = 5  # the quickest counts
SCRIPTS = sorted(path for folder in ("tools", "checkpoint_convert") for path in (ROOT / folder).glob("*.py"))


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd="/", env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_map_has_every_command_in_one_line_of_its_group() -> None:
    result = run_python("-m", PACKAGE, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert all(len(line) <= 105 for line in lines)
    rows = [re.fullmatch(r"  ([a-z-]+(?: [a-z-]+)?)  +(\S.*)", line) for line in lines[4:]]
    assert [(row[1], row[2]) for row in rows if row] == [(command.name, command.text) for command in COMMANDS]
    assert [line for line in lines if line in dict(GROUPS)] == [heading for heading, _ in GROUPS]
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(unbuffered: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", PACKAGE, "--help"], env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_every_module_of_cli_is_a_command_or_part_of_one() -> None:
    modules = {command.module for command in COMMANDS}
    for module in modules:
        names = [getattr(node, "name", None) for node in parse(MODULES[module]).body]
        assert "main" in names, module
    mains = {name for name in MODULES if re.fullmatch(r"cli\.(?!hammer$)\w+|cli\.\w+\.main", name)}
    packages = {name.removesuffix(".main") for name in mains if name.endswith(".main")}
    assert mains - packages == {module for module in modules if module.startswith("cli.")}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_only_calls_its_command(path) -> None:
    tree = parse(path)
    (target,) = [name for name in iterate_imports(tree) if name.startswith(PACKAGE)]
    assert target.removeprefix(f"{PACKAGE}.").removesuffix(".main") in {command.module for command in COMMANDS}
    assert len(path.read_text().splitlines()) <= 14
    assert not [node for node in tree.body if hasattr(node, "name")], "functions belong into megatron_hammer/cli/"


def test_the_map_imports_nothing_but_the_standard_library() -> None:
    program = (
        "import json, sys; before = set(sys.modules)\n"
        "from megatron_hammer.cli.hammer import main\n"
        "main(['--help']); print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    names = json.loads(run_python("-c", program).stdout.splitlines()[-1])
    assert "megatron_hammer.cli.hammer" in names
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {PACKAGE}


def test_the_map_appears_at_once() -> None:
    """Processor time, which is the waiting time on an idle machine: other work does not change it much."""
    seconds = []
    for _ in range(NUM_ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python("-m", PACKAGE, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert 0 < min(seconds) < MAX_SECONDS, seconds


@pytest.mark.parametrize(
    "words, message",
    [
        ("preproces-data", "got preproces-data. Did you mean preprocess-data"),
        ("tokenizer trian", "got tokenizer trian. Did you mean tokenizer train"),
        ("tokenizer", "got tokenizer. Did you mean tokenizer train or tokenizer merge or "),
        ("hf_to_megatron.py", "got hf_to_megatron.py. Did you mean convert from-hf"),
        ("xyzzy", "command: must be one of hammer's, got xyzzy. Run hammer --help for the list."),
        ("", "command: must be given, got none. Run hammer --help for the list."),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", ["check-environment", "tokenizer train", "scaling-study project"])
def test_help_of_a_command_shows_how_it_was_called(words: str) -> None:
    result = run_python("-m", PACKAGE, *words.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: hammer {words} ")


def test_a_word_that_several_commands_share_has_a_map_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        ["convert", "from-hf"],
        ["convert", "to-hf"],
        ["convert", "to-gguf"],
    ]


def test_exit_codes_of_commands_are_kept() -> None:
    assert run_python("-m", PACKAGE, "merge-data").returncode == 2
    assert run_python("-m", PACKAGE, "compare-runs", "--runs", "a=/none").returncode == 2
    result = run_python("-m", PACKAGE, "check-environment", "--extra", "no-such-extra")
    assert (result.returncode, "must be an extra of setup.py, got no-such-extra" in result.stderr) == (2, True)
