"""Where the shared corpora and tokenizers are, for tests that need real text; most machines do not have them."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(),
    reason="../shared/data is missing; put the shared corpora and tokenizers beside the checkout",
)
