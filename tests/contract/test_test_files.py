"""Where a test belongs: tests/unit/a/b/test_c.py tests megatron_hammer/a/b/c.py. Standard library only."""

from pathlib import Path

import pytest

from tests.helpers.imports import MODULES
from tests.helpers.repository import ROOT

UNIT_TESTS = ROOT / "tests" / "unit"


def find_module(test_file: Path) -> str | None:
    """The module that a unit test is about, such as a.b.c; None if the package has none of that name."""
    folder = test_file.relative_to(UNIT_TESTS).parent
    module = ".".join((*folder.parts, test_file.stem.removeprefix("test_")))
    return module if module in MODULES and MODULES[module].name != "__init__.py" else None


@pytest.mark.parametrize("test_file", sorted(UNIT_TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_unit_test_lies_where_its_module_lies(test_file: Path) -> None:
    assert find_module(test_file), (
        "the package has no module of this path and name; a test of several modules belongs in the file of its main "
        "module, in tests/numerics or in tests/integration"
    )


def test_a_test_of_no_module_is_caught() -> None:
    assert find_module(UNIT_TESTS / "model" / "test_layout.py") == "model.layout"
    assert find_module(UNIT_TESTS / "scaling" / "test_memory.py") is None  # a folder, not a module
    assert find_module(UNIT_TESTS / "test_flops.py") is None
