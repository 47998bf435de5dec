"""Extras, files, modules, commands and variables that scripts, the Dockerfile, documents or messages name exist.

Standard library only. tests/contract/test_repository.py checks the commands of the documents flag by flag.
"""

import re
import shlex
from pathlib import Path

import pytest

from megatron_hammer.cli.check_environment import read_setup
from megatron_hammer.cli.hammer import COMMANDS
from tests.helpers.imports import MODULES
from tests.helpers.repository import ROOT, list_tracked_files

EXTRAS = read_setup(ROOT / "setup.py").extras
FOLDERS = "tools|checkpoint_convert|examples|docker|docs|benchmarks|tests|megatron_hammer|\\.ci|\\.github"
# The package quotes sources elsewhere, which have examples/ and docs/ too.
FOLDERS_IN_PACKAGE = "tools|checkpoint_convert|megatron_hammer|docker|benchmarks"
TEXT_SUFFIXES = (".md", ".py", ".sbatch", ".sh", ".toml", ".txt", ".yaml", ".yml")
# These make up names on purpose, or tell of files that were.
EXCEPTIONS = ("tests/", "CHANGELOG.md")


def list_texts() -> list[str]:
    """Every text of the repository in which a stale name would mislead somebody."""
    names = [name for name in list_tracked_files() if not name.startswith(EXCEPTIONS) or name == "tests/run.sh"]
    return [name for name in names if name.endswith(TEXT_SUFFIXES) or Path(name).name.startswith(("Dockerfile", "run"))]


def list_extras(text: str) -> list[str]:
    """The extras that a text names: --extra X, EXTRAS=X, EXTRAS="X Y", .[x,y], megatron_hammer[x]."""
    found = re.findall(r"--extra[ =]([a-z][\w-]*)", text)
    for quoted, bare in re.findall(r"\b(?:SETUP_)?EXTRAS=(?:[\"']([\w ,-]*)[\"']|([\w-]+))", text):
        found += re.split(r"[ ,]+", quoted) if quoted else [bare]
    for group in re.findall(r"(?:(?<=[\s\"'])\.|\bmegatron_hammer)\[([a-z][\w,-]*)\]", text):
        found += group.split(",")
    return [extra for extra in found if extra]


def list_unknown_paths(text: str, folders: str = FOLDERS) -> list[str]:
    """Files of this repository's folders that a text names and that do not exist."""
    names = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w\.(?:py|sh|md|toml|c|j2|yml|yaml))\b", text)
    names += re.findall(rf"\$\{{?\w*root\}}?/((?:{folders})/[\w./-]*\w)", text)
    return [name for name in names if not (ROOT / name).exists()]


def list_unknown_modules(text: str) -> list[str]:
    names = re.findall(r"-m megatron_hammer\.([\w.]*\w)", text)
    return [name for name in names if name not in MODULES]


def list_unknown_hammer_commands(text: str) -> list[str]:
    """What follows `hammer` or `-m megatron_hammer` and is neither a command nor the first word of one."""
    known = {command.name for command in COMMANDS}
    known |= {name.split()[0] for name in known}
    found = re.findall(r"(?<![\w./-])hammer ((?:[a-z][\w-]*)(?: [a-z][\w-]*)?)", text)
    found += re.findall(r"-m megatron_hammer ((?:[a-z][\w-]*)(?: [a-z][\w-]*)?)", text)
    return [words for words in found if words not in known and words.split()[0] not in {c.name for c in COMMANDS}]


@pytest.mark.parametrize("name", list_texts())
def test_names_in_a_text_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [extra for extra in list_extras(text) if extra not in EXTRAS] == []
    folders = FOLDERS_IN_PACKAGE if name.startswith("megatron_hammer/") else FOLDERS
    assert list_unknown_paths(text, folders) == []
    assert list_unknown_modules(text) == []
    assert list_unknown_hammer_commands(text) == []


def test_a_stale_name_is_caught() -> None:
    dockerfile = (
        "RUN python3 tools/check_environment.py --extra dev --extra data > /tmp/missing.txt || cat /tmp/missing.txt"
    )
    assert list_extras(dockerfile) == ["dev", "data"]
    assert list_extras('SETUP_EXTRAS=dev source x; EXTRAS="a b-c"; pip install -e .[x,y] megatron_hammer[z]') == [
        *("dev", "a", "b-c", "x", "y", "z")
    ]
    assert list_extras("extras.[gone] EXTRAS=${EXTRAS:-} values[i]") == []
    assert list_unknown_paths('"$PYTHON" "$root/tools/gone.py" tools/merge_data.py "$demo_root/docs/gone"') == [
        *("tools/gone.py", "docs/gone")
    ]
    assert list_unknown_modules("python -m megatron_hammer.training.gone") == ["training.gone"]
    assert list_unknown_hammer_commands("`hammer convert gone`, `hammer convert`, `hammer merge-data out`") == [
        "convert gone"
    ]


def test_every_extra_is_documented() -> None:
    named = {extra for name in list_texts() if name.endswith(".md") for extra in list_extras((ROOT / name).read_text())}
    assert set(EXTRAS) <= named


def list_unknown_steps(text: str) -> list[str]:
    """Steps of .ci/run that a text names."""
    known = re.findall(r"^    (\w+)\)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    named = [word for words in re.findall(r"\.ci/run((?: [a-z]+)+)", text) for word in words.split()]
    named += [word for words in re.findall(r"^ *step: \[(.*)\]", text, re.MULTILINE) for word in words.split(", ")]
    return [word for word in named if word not in known]


@pytest.mark.parametrize("name", [".github/workflows/ci.yml", ".pre-commit-config.yaml", "CONTRIBUTING.md"])
def test_named_steps_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    code = re.sub(r"^#.*$", "", text, flags=re.MULTILINE) if not name.endswith(".md") else text.split("```")[1]
    code = re.sub(r" +#.*", "", code)
    assert ".ci/run" in code
    assert list_unknown_steps(code) == []
    assert list_unknown_steps("bash .ci/run lint gone\n    step: [types, old]") == ["gone", "old"]


# --- environment variables -------------------------------------------------------------------------------------------

SHELL_SCRIPTS = [name for name in list_texts() if name.endswith(".sh") or name == ".ci/run"]


def list_read_variables(script: str) -> set[str]:
    """The variables that a script, or one of ours that it calls or sources, expands."""
    seen: set[str] = set()
    pending, variables = [script], set()
    while pending:
        name = pending.pop()
        text = re.sub(r"^\s*#.*$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        variables |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)\b", text))
        seen.add(name)
        called = re.findall(rf"\b((?:{FOLDERS})/[\w/-]+\.sh)\b", text)
        pending += [other for other in called if other not in seen]
    return variables


def list_documented_variables(script: str) -> set[str]:
    """What stands in the first column under "From the environment:" of a script's head."""
    _, _, rest = (ROOT / script).read_text(encoding="utf-8").partition("# From the environment:\n")
    rows = re.match(r"(?:#.*\n)*", rest)[0].splitlines()
    columns = (re.match(r"#   ([A-Z][A-Z0-9_]*(?: [A-Z][A-Z0-9_]*)*)(?:  |$)", row) for row in rows)
    return {name for column in columns if column for name in column[1].split()}


def list_assignments(text: str) -> list[tuple[str, str]]:
    """(variable, script of ours) for each NAME=value before a script that is called or sourced."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        call = re.search(
            rf"((?:\b[A-Z][A-Z0-9_]*=\S+\s+)+)(?:bash|source) \"?(?:\$\w+/)?((?:{FOLDERS})/[\w/.-]+)", line
        )
        if call:
            found += [(word.split("=")[0], call[2]) for word in shlex.split(call[1])]
    return found


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_documented_variables_are_read(script: str) -> None:
    assert list_documented_variables(script) - list_read_variables(script) == set()


@pytest.mark.parametrize("name", [name for name in list_texts() if not name.endswith(".py")])
def test_variables_set_for_a_script_are_read_by_it(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [pair for pair in list_assignments(text) if pair[0] not in list_read_variables(pair[1])] == []


def test_an_unread_variable_is_caught() -> None:
    lines = (
        "DATA=x TP=2 \\",
        "    bash examples/pretrain_hammer_1b4.sh",
        'SETUP_EXTRAS=dev source "$root/tools/setup_environment.sh"',
    )
    pairs = list_assignments("\n".join(lines))
    script = "examples/pretrain_hammer_1b4.sh"
    assert pairs == [("DATA", script), ("TP", script), ("SETUP_EXTRAS", "tools/setup_environment.sh")]
    assert "DATA" not in list_read_variables(script)
    assert "TP" in list_documented_variables(script)
    assert "SETUP_EXTRAS" in list_read_variables("tools/setup_environment.sh")
