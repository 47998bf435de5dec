"""What the repository promises about itself: import direction, documented commands, scripts. Standard library only."""

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.tokenizer.vocabulary.recipes import RECIPES as TOKENIZER_PRESETS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_hammer"

# The exact arithmetic about a model, which model/accounting.py opens.
ARITHMETIC = (
    "model.accounting",
    "model.flops",
    "model.layout",
    "model.memory",
    "model.memory_activations",
    "model.memory_loss",
    "model.memory_options",
    "model.memory_state",
    "model.parameters",
    "model.pipeline_split",
)
# A unit may import units of its own row and of the rows above it. Longest name wins.
LAYERS = (
    ("errors",),
    ("presets", "preset_types", "preset_families", *ARITHMETIC, "scaling"),
    # Preflight looks into the checkpoint that a run would load; reading one needs nothing else of the package.
    (
        "checkpoint.bit_patterns",
        "checkpoint.hf_weights",
        "checkpoint.legacy",
        "checkpoint.mapped_tensor",
        "checkpoint.reader",
        "checkpoint.safe_unpickle",
        "checkpoint.safetensors_copy",
        "checkpoint.save_consistency",
        "checkpoint.torch_dist_store",
    ),
    ("config", "tokenizer", "data", "platforms"),
    ("model", "checkpoint"),
    ("training",),
)
# Neither these modules nor what they import when loaded may load torch or megatron: a login node reads them at once.
WITHOUT_TORCH = ("errors", "presets", *ARITHMETIC, "scaling")
# What only the named files or folders of the package may say, and why.
RESERVED = (
    (r"torch\.cuda(\.|$)", ("platforms/",), "so that the same code runs on CPU and GPU"),
    (
        r"megatron\.training\.(global_vars|get_args|set_args|set_global_variables)(\.|$)",
        ("config/arguments.py",),
        "everything else takes its inputs as arguments",
    ),
    (
        r"megatron\.training\.(arguments|argument_utils)(\.|$)",
        ("config/arguments.py", "config/megatron_checks.py"),
        "one file constructs Megatron's configuration, one tries it on a copy",
    ),
)
# Sourced, so they must leave their caller's shell options alone; every other script sets its own.
SOURCED_SCRIPTS = ("tools/setup_environment.sh",)
READMES = ("README.md", "README_zh-CN.md")
DOCUMENTS = (
    *READMES,
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/checkpoints.md",
    "docs/data.md",
    "docs/scaling.md",
)
TRAINING_MODULE = "megatron_hammer.training.pretrain"
# These hand flags that they do not know to Megatron, like the training module itself.
TAKES_MEGATRON_FLAGS = ("tools/build_rank.py",)
# The first word after these is a command with flags of its own.
HAS_COMMANDS = ("checkpoint_convert/edit_checkpoint.py", "tools/scaling_study.py")
LARGEST_FILE_BYTES = 1_000_000


# --- import direction ------------------------------------------------------------------------------------------------


def list_modules() -> dict[str, Path]:
    """Every module of the package by its name without the package's."""
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = list_modules()
ALL_TOP_UNITS = {unit.split(".")[0] for units in LAYERS for unit in units}


def is_skipped_at_load(node: ast.AST) -> bool:
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    return is_for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def iterate_imports(tree: ast.AST, *, at_load_only: bool = False) -> Iterator[str]:
    """Full dotted names imported; `from a import b` gives a.b. at_load_only: not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_load_only and is_skipped_at_load(node):
            continue
        else:
            yield from iterate_imports(node, at_load_only=at_load_only)


def iterate_dotted_names(tree: ast.AST) -> Iterator[str]:
    """Imports, and attributes spelled out on a plain name (`torch.cuda.Event`)."""
    yield from iterate_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", text):
                yield text


def layer_of(module: str) -> int | None:
    """Row of LAYERS, by the longest unit that is the module or holds it; None for the package itself."""
    matches = [
        (len(unit), row)
        for row, units in enumerate(LAYERS)
        for unit in units
        if module == unit or module.startswith(unit + ".")
    ]
    return max(matches)[1] if matches else None


def resolve(name: str) -> str | None:
    """The module of ours that a dotted import loads: megatron_hammer.a.b.function -> a.b."""
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        return None
    parts = name.split(".")[1:]
    while ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def list_layer_violations(module: str, tree: ast.AST) -> list[str]:
    own = layer_of(module)
    if own is None:
        return []
    targets = {resolve(name) for name in iterate_imports(tree)} - {None, ""}
    return [f"{module} imports {target}" for target in sorted(targets) if (layer_of(target) or 0) > own]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_one_way(module: str) -> None:
    assert module.split(".")[0] in ALL_TOP_UNITS, f"{module}: give it a row in LAYERS"
    if MODULES[module].name != "__init__.py":
        assert layer_of(module) is not None, f"{module}: give it a row in LAYERS"
    assert list_layer_violations(module, parse(MODULES[module])) == []


def test_a_wrong_import_is_caught() -> None:
    source = "def f():\n    from megatron_hammer.presets.catalogue import PRESETS"
    assert list_layer_violations("errors", ast.parse(source)) == ["errors imports presets"]
    assert list_layer_violations("config.options", ast.parse(source)) == []


def list_torch_imports(module: str) -> list[str]:
    """Chains by which loading the module would load torch or megatron."""
    chains, pending, seen = [], [(module, module)], {module}
    while pending:
        current, chain = pending.pop()
        for name in iterate_imports(parse(MODULES[current]), at_load_only=True):
            if name.split(".")[0] in ("torch", "megatron", "transformers"):
                chains.append(f"{chain} -> {name}")
            target = resolve(name)
            if target and target not in seen:
                seen.add(target)
                pending.append((target, f"{chain} -> {target}"))
    return chains


@pytest.mark.parametrize("unit", WITHOUT_TORCH)
def test_loads_without_torch(unit: str) -> None:
    modules = [module for module in MODULES if module == unit or module.startswith(unit + ".")]
    for module in modules:
        assert list_torch_imports(module) == []
        for name in iterate_imports(parse(MODULES[module])):
            assert name.split(".")[0] not in ("torch", "megatron"), f"{module} imports {name}"


@pytest.mark.parametrize("pattern, homes, reason", RESERVED, ids=[row[0].split("(")[0] for row in RESERVED])
def test_reserved_names_stay_home(pattern: str, homes: tuple[str, ...], reason: str) -> None:
    folders = [ROOT / PACKAGE, ROOT / "tools", ROOT / "checkpoint_convert"]
    strays = []
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        if any(path.relative_to(ROOT).as_posix().startswith(f"{PACKAGE}/{home}") for home in homes):
            continue
        names = {name for name in iterate_dotted_names(parse(path)) if re.match(pattern, name)}
        strays += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(names)]
    assert strays == [], f"only {', '.join(homes)} may say this: {reason}"


def test_nothing_imports_the_entry_points() -> None:
    for module, path in MODULES.items():
        for name in iterate_imports(parse(path)):
            assert name.split(".")[0] not in ("tools", "checkpoint_convert", "examples", "tests"), module


# --- documented commands ---------------------------------------------------------------------------------------------


def list_commands(document: str) -> list[str]:
    """Command lines of the fenced bash blocks, continued lines joined, comments dropped."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = lines.replace("\\\n", " ")
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines.splitlines())
    return [" ".join(line.split()) for line in stripped if line]


COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in list_commands(document)))


@functools.cache
def read_known_flags(*command: str) -> frozenset[str]:
    """Every --flag in the command's --help. Skips the test where the environment lacks a package it needs."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search_path}
    result = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    absent = re.search(r"ModuleNotFoundError: No module named '(?!megatron_hammer)([\w.]+)'", result.stderr)
    if absent:
        pytest.skip(f"{absent[1]} is missing; bash tests/run.sh installs it")
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
        assert re.search(rf"\b{setting.split('=')[0]}\b", text), f"{command}: {words[0]} does not read {setting}"


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_real(command: str) -> None:
    words = shlex.split(command)
    settings = []
    while re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        settings.append(words.pop(0))
    for preset in re.findall(r"--preset[ =](\S+)", command):
        assert preset in (TOKENIZER_PRESETS if "tools/tokenizer_train.py" in words else PRESETS), command
    program, *rest = words
    if program == "torchrun":
        split = rest.index("-m")
        assert_flags_are_known(rest[:split], read_known_flags("-m", "torch.distributed.run"), command)
        check_python_command(rest[split:], command)
    elif program == "python":
        check_python_command(rest, command)
    elif program in ("bash", "source"):
        check_shell_command(rest, settings, command)
    else:
        assert program in ("docker", "git", "cd"), f"{command}: teach this test to check {program}"


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (list_commands(document) for document in READMES)
    assert english == chinese
    assert "bash examples/pretrain_hammer_1b4.sh" in english
    assert "bash tests/run.sh" in english


@pytest.mark.parametrize("document", READMES)
def test_preset_table_is_complete_and_exact(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
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


@functools.cache
def list_tracked_files() -> tuple[str, ...]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("the clone's .git folder is missing: clone with git rather than copying the files")
    return tuple(name for name in result.stdout.split("\0") if name and (ROOT / name).exists())


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
    return sorted(path for path in paths if path.suffix == ".sh" or path == ROOT / ".ci" / "run")


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
