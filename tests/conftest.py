"""What every test needs: one thread a process. It is set here because it counts only before torch is imported."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long part of tests/faults unless the command asks for it."""
    if "long" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: bash tests/run.sh tests/faults -m long"))
