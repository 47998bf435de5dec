"""The package's modules and what each of them imports, read from the source with the standard library alone."""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.helpers.repository import ROOT

PACKAGE = "megatron_hammer"


def list_modules() -> dict[str, Path]:
    """Every module of the package by its name without the package's; the package itself is ""."""
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = list_modules()


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def iterate_imports(tree: ast.AST, *, at_load_only: bool = False) -> Iterator[str]:
    """Full dotted names imported; `from a import b` gives a.b. at_load_only: not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_load_only and _is_skipped_at_load(node):
            continue
        else:
            yield from iterate_imports(node, at_load_only=at_load_only)


def resolve(name: str) -> str | None:
    """The module of ours that a dotted import loads: megatron_hammer.a.b.function -> a.b."""
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        return None
    parts = name.split(".")[1:]
    while ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def list_targets(tree: ast.AST) -> set[str]:
    """The modules of ours that a source imports anywhere, also inside functions and for types only."""
    return {target for name in iterate_imports(tree) if (target := resolve(name))}


def list_circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach one another (strongly connected components of more than one node)."""
    reached = {node: _reach(node, arrows) for node in arrows}
    circles = {
        frozenset(other for other in reached[node] if node in reached.get(other, ())) | {node}
        for node in arrows
        if node in reached[node]
    }
    return sorted(sorted(circle) for circle in circles)


def _reach(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for target in arrows.get(pending.pop(), ()):
            if target not in seen:
                seen.add(target)
                pending.append(target)
    return seen


def _is_skipped_at_load(node: ast.AST) -> bool:
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    return is_for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
