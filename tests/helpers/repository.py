"""The repository's root and tracked files, and the shared data beside it."""

import functools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Corpora and tokenizers of others, for tests that need real text; most machines do not have them.
SHARED_DATA = ROOT.parent / "shared" / "data"

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(),
    reason="../shared/data is missing; put the shared corpora and tokenizers beside the checkout",
)


@functools.cache
def list_tracked_files() -> tuple[str, ...]:
    """Paths of the tracked files that exist, relative to the repository's root."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("the clone's .git folder is missing: clone with git rather than copying the files")
    return tuple(name for name in result.stdout.split("\0") if name and (ROOT / name).exists())
