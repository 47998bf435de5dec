"""Imports: rooms in a strict order, no circles, and names that only their room may use. Standard library only.

docs/architecture.md explains the order; here is the table that holds it.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.imports import MODULES, PACKAGE, iterate_imports, list_circles, list_targets, parse, resolve
from tests.helpers.repository import ROOT

# A room imports itself and the rooms above it.
ROOMS = (
    "errors",
    "files",
    "model",
    "presets",
    "corpus",
    "tokenizer",
    "data",
    "checkpoint_files",
    "scaling",
    "platforms",
    "config",
    "checkpoint",
    "training",
    "evaluation",
    "post_training",
    "serving",
    "cli",
    "__main__",
)
# Rooms that load neither torch nor megatron, so that they answer at once on a login node.
WITHOUT_TORCH = ("errors", "files", "presets", "corpus", "scaling")
# `model` has both halves: these build modules, the others are arithmetic.
TORCH_MODULES_OF_MODEL = (
    "model.chunked_cross_entropy",
    "model.cross_entropy",
    "model.cross_entropy_torch",
    "model.cross_entropy_triton",
    "model.kernels.rms_norm",
    "model.kernels.rope",
    "model.layer_spec",
    "model.provider",
    "model.te_attention",
    "model.torch_modules",
)
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


def room_of(module: str) -> str:
    return module.split(".")[0]


def list_upward_imports(module: str, tree: ast.AST) -> list[str]:
    own = ROOMS.index(room_of(module))
    targets = sorted(list_targets(tree) - {""})  # the package itself holds nothing but its version
    return [f"{module} imports {target}" for target in targets if ROOMS.index(room_of(target)) > own]


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_one_way(module: str) -> None:
    assert room_of(module) in ROOMS, f"{module}: give its room a place in ROOMS"
    assert list_upward_imports(module, parse(MODULES[module])) == []


def test_an_upward_import_is_caught() -> None:
    source = ast.parse("def f():\n    from megatron_hammer.presets.catalogue import PRESETS")
    assert list_upward_imports("model.flops", source) == ["model.flops imports presets.catalogue"]
    assert list_upward_imports("config.options", source) == []


def sub_room_of(module: str) -> str:
    """The folder inside the room, or the file that lies directly in the room."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("name_of", [lambda module: module, sub_room_of], ids=["files", "sub-rooms"])
def test_there_are_no_circles(name_of) -> None:
    arrows: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module:
            own = name_of(module)
            arrows.setdefault(own, set()).update({name_of(target) for target in list_targets(parse(path))} - {own})
    assert list_circles(arrows) == []


def test_a_circle_is_caught() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert list_circles(arrows) == [["a", "b", "c"]]
    assert list_circles({**arrows, "c": {"d"}}) == []


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


TORCH_FREE = [module for module in MODULES if room_of(module) in WITHOUT_TORCH] + [
    module for module in MODULES if room_of(module) == "model" and module not in TORCH_MODULES_OF_MODEL
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_loads_without_torch(module: str) -> None:
    assert list_torch_imports(module) == []
    names = {name.split(".")[0] for name in iterate_imports(parse(MODULES[module]))}
    assert not names & {"torch", "megatron"}, "not even inside a function"


def iterate_dotted_names(tree: ast.AST) -> Iterator[str]:
    """Imports, and attributes spelled out on a plain name (`torch.cuda.Event`)."""
    yield from iterate_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", text):
                yield text


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


# The files in which Megatron's arguments are an argparse namespace; everything else takes the plan that is read off it.
NAMESPACE_HOMES = ("config.arguments", "config.megatron_checks", "config.training_state")


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in ("config", "training", "cli")])
def test_the_namespace_of_megatron_stays_home(module: str) -> None:
    if module in NAMESPACE_HOMES:
        return
    reads = [
        ast.unparse(node)
        for node in ast.walk(parse(MODULES[module]))
        if isinstance(node, ast.Attribute) and re.search(r"\bnamespace$", ast.unparse(node.value))
    ]
    assert reads == [], "read it in config/read_plan.py, as a field of RunSettings or RunPlan"


def test_nothing_imports_the_entry_points() -> None:
    for module, path in MODULES.items():
        for name in iterate_imports(parse(path)):
            assert name.split(".")[0] not in ("tools", "checkpoint_convert", "examples", "tests"), module
