"""Every call from the package into megatron, torch and TransformerEngine, held against the installed signature.

A wrong or missing argument on a path that only a GPU takes would else be found there. The calls are read from the
source, their names resolved through its imports, and the arguments bound without calling anything.
"""

import ast
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.repository import ROOT

LIBRARIES = ("megatron", "torch")


def read_imports(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name, of everything that a module imports anywhere from the libraries."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {local: dotted for local, dotted in names.items() if dotted.split(".")[0] in LIBRARIES}


def read_dotted(node: ast.expr) -> list[str] | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*reversed([*parts, node.id])] if isinstance(node, ast.Name) else None


def list_uses(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """(dotted name, expression) for each name of a library that a module reads, replaces or calls."""
    tree = ast.parse(path.read_text())
    imports = read_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.Attribute):
            dotted = read_dotted(node.func if isinstance(node, ast.Call) else node)
            if dotted and dotted[0] in imports:
                yield ".".join([imports[dotted[0]], *dotted[1:]]), node


def find_mismatch(dotted: str, use: ast.expr) -> str | None:
    """Why a use does not fit; None where it does, or where the callee has no signature (torch's C functions)."""
    try:
        found = pkgutil.resolve_name(dotted)
    except (AttributeError, ImportError) as error:
        return f"{dotted} does not exist: {error}"
    if not isinstance(use, ast.Call):
        return None
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return None
    is_partial = any(isinstance(argument, ast.Starred) for argument in use.args)
    is_partial = is_partial or any(keyword.arg is None for keyword in use.keywords)
    positional = [None for argument in use.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg: None for keyword in use.keywords if keyword.arg is not None}
    bind = signature.bind_partial if is_partial else signature.bind
    try:
        bind(*positional, **named)
    except TypeError as error:
        return f"{dotted}{signature}: {error}"
    return None


def list_mismatches(root: Path) -> tuple[int, list[str]]:
    """(number of uses, a line for each that does not fit) of all modules below `root`."""
    count, problems = 0, []
    for path in sorted(root.rglob("*.py")):
        for dotted, use in list_uses(path):
            count += 1
            problem = find_mismatch(dotted, use)
            if problem is not None:
                problems.append(f"{path.name}:{use.lineno}: {problem}")
    return count, problems


def check(root: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what the platforms replace in torch has other signatures in this one."""
    command = [sys.executable, __file__, str(root)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_every_use_of_a_library_fits_the_installed_one() -> None:
    result = check(ROOT / "megatron_hammer")
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[0]) > 600


def test_a_wrong_use_is_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "import torch\n"
        "from megatron.core import parallel_state\n"
        "from megatron.core.utils import get_batch_on_this_cp_rank\n"
        "get_batch_on_this_cp_rank({}, cp_group=None)\n"
        "parallel_state.get_nothing()\n"
        "torch.distributed.init_process_group('nccl', device=0)\n"
        "torch.cuda.current_devices\n"
    )
    result = check(tmp_path)
    assert result.returncode == 1
    lines = [line.split(":")[1] for line in result.stdout.splitlines() if line.startswith("wrong.py")]
    assert sorted(set(lines)) == ["4", "5", "6", "7"]


if __name__ == "__main__":
    num_uses, mismatches = list_mismatches(Path(sys.argv[1]))
    print(num_uses, "uses", *mismatches, sep="\n")
    sys.exit(bool(mismatches))
