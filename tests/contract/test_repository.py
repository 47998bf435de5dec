"""What the repository promises about itself: documented commands, scripts, files. Standard library only."""

import functools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_hammer.cli.hammer import COMMANDS as HAMMER_COMMANDS
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.tokenizer.vocabulary.recipes import RECIPES as TOKENIZER_PRESETS
from tests.helpers.imports import MODULES, PACKAGE
from tests.helpers.repository import ROOT, list_tracked_files
from tests.helpers.tool_runs import run_python_here

# Sourced, so they must leave their caller's shell options alone; every other script sets its own.
SOURCED_SCRIPTS = ("tools/setup_environment.sh",)
READMES = ("README.md", "README_zh-CN.md")
DOCUMENTS = (
    *READMES,
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "docker/README.md",
    "docs/architecture.md",
    "docs/clusters.md",
    "docs/checkpoints.md",
    "docs/data.md",
    "docs/post_training.md",
    "docs/presets.md",
    "docs/reliability.md",
    "docs/scaling.md",
    "docs/scaling_accuracy.md",
    "docs/scaling_model.md",
    "docs/serving.md",
    "examples/kubernetes/README.md",
    "examples/slurm/README.md",
)
TRAINING_MODULE = "megatron_hammer.training.pretrain"
# These hand flags that they do not know to Megatron, like the training module itself.
TAKES_MEGATRON_FLAGS = ("tools/build_rank.py", "build-rank", "tools/check_cluster.py", "check-cluster")
# The first word after these is a command with flags of its own.
HAS_COMMANDS = (
    "checkpoint_convert/edit_checkpoint.py",
    "checkpoint edit",
    "tools/post_train.py",
    "post-train",
    "tools/scaling_study.py",
    "scaling-study",
)
LARGEST_FILE_BYTES = 1_000_000


# --- documented commands ---------------------------------------------------------------------------------------------


def list_commands(document: str) -> list[str]:
    """Command lines of the fenced bash blocks, continued lines joined, comments dropped."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
    lines = lines.replace("\\\n", " ")
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines.splitlines())
    return [" ".join(line.split()) for line in stripped if line]


COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in list_commands(document)))


@functools.cache
def read_known_flags(*command: str) -> frozenset[str]:
    """Every --flag in the command's --help. Skips the test where the environment lacks a package it needs."""
    try:
        result = run_python_here(*command, "--help", cwd=ROOT)
    except ModuleNotFoundError as error:
        if str(error.name).startswith(PACKAGE):
            raise
        pytest.skip(f"{error.name} is missing; bash tests/run.sh installs it")
    assert result.returncode == 0, f"{' '.join(command)} --help: {result.stderr[-2000:]}"
    return frozenset(re.findall(r"--[A-Za-z0-9][\w-]*", result.stdout))


def assert_flags_are_known(words: list[str], known: frozenset[str], command: str) -> None:
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    assert [flag for flag in flags if flag not in known] == [], command


def check_python_command(words: list[str], command: str) -> None:
    """words: what follows `python`, or what follows torchrun's own flags."""
    if words[0] == "-m":
        module, *rest = words[1:]
        if module.startswith(PACKAGE):
            assert module.removeprefix(PACKAGE + ".") in MODULES, command
        assert_flags_are_known(rest, read_known_flags("-m", module), command)
        return
    script, *rest = words
    assert (ROOT / script).is_file(), command
    known = read_known_flags(script, *rest[: script in HAS_COMMANDS])
    if script in TAKES_MEGATRON_FLAGS:
        known |= read_known_flags("-m", TRAINING_MODULE)
    assert_flags_are_known(rest, known, command)


def check_shell_command(words: list[str], settings: list[str], command: str) -> None:
    """A script of ours: it must exist and read every NAME=value set for it."""
    path = ROOT / words[0]
    assert path.is_file(), command
    text = path.read_text(encoding="utf-8")
    for setting in settings:
        assert re.search(rf"\$\{{?{setting.split('=')[0]}\b", text), f"{command}: {words[0]} does not read {setting}"


def check_docker_command(words: list[str], command: str) -> None:
    """docker build: its file must exist and declare every --build-arg. docker run: it runs a command of hammer."""
    if words[0] == "run":
        image = next(index for index, word in enumerate(words) if word.startswith("megatron_hammer"))
        return check_hammer_command(words[image + 1 :], command)
    assert words[0] == "build", f"{command}: teach this test to check docker {words[0]}"
    path = ROOT / words[words.index("-f") + 1]
    assert path.is_file(), command
    declared = re.findall(r"^ARG (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"--build-arg[ =](\w+)=", command):
        assert name in declared, f"{command}: {path.name} has no ARG {name}"


def check_cluster_command(program: str, words: list[str], command: str) -> None:
    """sbatch and kubectl: a script or manifest of ours must exist. Their own options are not known here."""
    files = [word for word in words if word.startswith("examples/")]
    assert len(files) == 1 or (program, words[0]) == ("kubectl", "logs"), command
    assert [name for name in files if not (ROOT / name).is_file()] == [], command


def check_hammer_command(words: list[str], command: str) -> None:
    if words == ["--help"]:
        return
    name = next(
        (row.name.split() for row in HAMMER_COMMANDS if words[: row.name.count(" ") + 1] == row.name.split()), None
    )
    assert name is not None, f"{command}: hammer has no such command"
    rest = words[len(name) :]
    known = read_known_flags("-m", PACKAGE, *name, *rest[: " ".join(name) in HAS_COMMANDS])
    if " ".join(name) in TAKES_MEGATRON_FLAGS:
        known |= read_known_flags("-m", TRAINING_MODULE)
    assert_flags_are_known(rest, known, command)


def check_command(command: str) -> None:
    words = shlex.split(command)
    settings = []
    while re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        settings.append(words.pop(0))
    for preset in re.findall(r"--preset[ =](\S+)", command):
        assert preset in (TOKENIZER_PRESETS if "tools/tokenizer_train.py" in words else PRESETS), command
    program, *rest = words
    if program == "torchrun":
        # A module or a script; everything before it is torchrun's.
        split = next(index for index, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
        assert_flags_are_known(rest[:split], read_known_flags("-m", "torch.distributed.run"), command)
        check_python_command(rest[split:], command)
    elif program == "python":
        check_python_command(rest, command)
    elif program in ("bash", "source"):
        check_shell_command(rest, settings, command)
    elif program in ("sbatch", "kubectl"):
        check_cluster_command(program, rest, command)
    elif program == "export":
        assert all(re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word) for word in rest), command
    elif program == "docker":
        check_docker_command(rest, command)
    elif program == "hammer":
        check_hammer_command(rest, command)
    else:
        pytest.fail(f"{command}: teach this test to check {program}")


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_real(command: str) -> None:
    check_command(command)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("hammer tokenizer train --input x --output y.model", "hammer tokenizer train --input x --outputs y.model"),
        ("hammer scaling-study emit --projection x", "hammer scaling-study emit --project x"),
        ("hammer compare-runs --runs a=b", "hammer compare --runs a=b"),
        ("docker build -f docker/Dockerfile --build-arg EXTRAS=gguf .", "docker build -f docker/Gone ."),
        ("docker build -f docker/Dockerfile .", "docker build -f docker/Dockerfile --build-arg GONE=1 ."),
        ("sbatch --time 1:00:00 examples/slurm/pretrain.sbatch", "sbatch --time 1:00:00 examples/slurm/gone.sbatch"),
        ("kubectl apply -f examples/kubernetes/jobset.yaml", "kubectl apply -f examples/kubernetes/gone.yaml"),
        ("TP=2 bash examples/pretrain_hammer_1b4.sh", "GONE=2 bash examples/pretrain_hammer_1b4.sh"),
        ("source tools/setup_environment.sh", "cd .."),
    ],
)
def test_a_wrong_command_is_caught(right: str, wrong: str) -> None:
    check_command(right)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(wrong)


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (list_commands(document) for document in READMES)
    assert english == chinese
    assert "bash examples/pretrain_hammer_1b4.sh" in english
    assert "bash tests/run.sh" in english


def test_preset_table_is_complete_and_exact() -> None:
    text = (ROOT / "docs/presets.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \|", text, re.MULTILINE))
    assert rows == {name: f"{preset.num_parameters:,}" for name, preset in PRESETS.items()}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    """Links, and backticked paths of this repository (those that begin with one of its top-level folders or files)."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [(ROOT / document).parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    folders = "megatron_hammer|tools|checkpoint_convert|examples|tests|docs|docker|benchmarks|\\.ci"
    paths = [ROOT / path for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text)]
    assert [str(path) for path in links + paths if not path.exists()] == []


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", READMES)
def test_readme_tree_is_the_repository(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named = {line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")}
    tracked = {name.split("/")[0] + "/" for name in list_tracked_files() if "/" in name and not name.startswith(".")}
    assert {name for name in named if name.endswith("/")} == tracked
    assert [name for name in named if not (ROOT / name).exists()] == []


def list_shell_scripts() -> list[Path]:
    folders = ["tools", "tests", "examples", "docker", "checkpoint_convert", "benchmarks", ".ci"]
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in paths if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci" / "run")


@pytest.mark.parametrize("path", list_shell_scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_is_strict(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    is_strict = re.search(r"^set -euo pipefail$", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    is_sourced = path.relative_to(ROOT).as_posix() in SOURCED_SCRIPTS
    assert is_strict != is_sourced
    assert os.access(path, os.X_OK) != is_sourced, "chmod +x what is executed, and not what is sourced"


def test_no_large_files() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in list_tracked_files()}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE_BYTES} == {}
